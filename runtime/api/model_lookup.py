"""Finds the loaded model that a request names: by the mesh's header first, then by the request's own field."""

from common.model_id import InvalidModelId, check_model_id
from runtime.errors import InvalidRequest, ModelNotFound
from runtime.interfaces import ModelDirectory, ServedModel

MODEL_ID_HEADER = "mm-model-id"


def find_model(
    directory: ModelDirectory, header: str | None, asked: str, *, lone_takes_all: bool = False
) -> ServedModel:
    """Return the model with the id `header`, or without a header the one whose id or name is `asked`.

    `lone_takes_all`: without a header, the only loaded model serves any name, like a TGIS with a single model.
    Raises InvalidRequest if neither is given, ModelNotFound listing the loaded models.
    """
    if header or asked:
        try:
            check_model_id(header or asked, "model")
        except InvalidModelId as error:
            raise InvalidRequest(str(error), param="model") from None
    if header:
        return directory.get(header)
    loaded = directory.list()
    if lone_takes_all and len(loaded) == 1:
        return directory.get(loaded[0].model_id)
    if not asked:
        raise InvalidRequest("model is missing: it names the model to use", param="model")
    by_name = next((model.model_id for model in loaded if asked in (model.model_id, model.name)), asked)
    try:
        return directory.get(by_name)
    except ModelNotFound as error:
        names = ", ".join(sorted(model.name for model in loaded)[:32]) or "none"
        raise ModelNotFound(f"it is not loaded here; loaded: {names}", model=asked) from error

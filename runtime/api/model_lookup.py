"""Finds the loaded model that a request names: by the mesh's header first, then by the request's own field."""

from common.model_id import InvalidModelId, check_model_id
from runtime.errors import InvalidRequest, ModelNotFound
from runtime.interfaces import ModelDirectory, ServedModel

MODEL_ID_HEADER = "mm-model-id"


def find_adapter(
    directory: ModelDirectory, base: ServedModel, asked: str, param: str, *, by_header: bool
) -> ServedModel:
    """Return the adapter of `base` whose name or id is `asked`; `base` itself if nothing is asked for. Raises InvalidRequest naming `param`.

    `by_header`: a header named `base`. If that is an adapter, a mesh has chosen it by `asked` already, perhaps by an alias.
    """
    if not asked or asked in (base.name, base.model_id) or (by_header and base.base_id):
        return base
    for model in directory.list():
        if model.base_id and asked in (model.name, model.model_id) and model.base_id in (base.model_id, base.base_id):
            return directory.get(model.model_id)
    raise InvalidRequest(
        f"{param} {asked!r} is not an adapter of it that is loaded here; register the adapter and send its name as the model",
        model=base.name,
        param=param,
    )


def find_model(
    directory: ModelDirectory, header: str | None, asked: str, *, lone_takes_all: bool = False
) -> ServedModel:
    """Return the model with the id `header`, or without a header the one whose id or name is `asked`.

    `lone_takes_all`: without a header, the only loaded model (adapters aside) serves any name, like a TGIS with a single model.
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
    bases = [model for model in loaded if not model.base_id]
    if lone_takes_all and len(bases) == 1 and not any(asked in (model.model_id, model.name) for model in loaded):
        return directory.get(bases[0].model_id)
    if not asked:
        raise InvalidRequest("model is missing: it names the model to use", param="model")
    by_name = next((model.model_id for model in loaded if asked in (model.model_id, model.name)), asked)
    try:
        return directory.get(by_name)
    except ModelNotFound as error:
        names = ", ".join(sorted(model.name for model in loaded)[:32]) or "none"
        raise ModelNotFound(f"it is not loaded here; loaded: {names}", model=asked) from error

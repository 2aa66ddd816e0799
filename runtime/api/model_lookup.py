"""Which loaded model an HTTP or gRPC request means: the mesh's header first, then the request's own field."""

from runtime.errors import InvalidRequest, ModelNotFound
from runtime.interfaces import ModelDirectory, ServedModel

MODEL_ID_HEADER = "mm-model-id"


def find_model(
    directory: ModelDirectory, header: str | None, asked: str, *, lone_takes_all: bool = False
) -> ServedModel:
    """`header` is a concrete model id. Without one, `asked` is an id or the name of a loaded model.

    `lone_takes_all`: without a header, the only loaded model answers to any name, as a single-model TGIS does.
    Raises InvalidRequest when neither is given, ModelNotFound naming what is loaded.
    """
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

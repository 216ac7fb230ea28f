"""Configuration of a checkpoint: config.json and generation_config.json, read by the family that config.json names."""

from os import PathLike
from typing import Any

from ..errors import ArgumentError, ConfigurationError
from ..models import Composition
from .documents import Keys, read_object
from .families import FAMILIES, REFUSED
from .family import Family
from .folder import CONFIG, GENERATION, Folder, find_folder
from .size import check_size


def load_config(path_or_name: str | PathLike[str], *, length: int | None = None, revision: str | None = None) -> Any:
    """The configuration of a checkpoint, as `load_model` uses it; a `Composition` where layers differ by more than
    windows, which no configuration describes (`composed` makes a new model of it).

    The arguments and the exceptions are those of `load_model` that concern config.json.
    """
    folder = find_folder(path_or_name, [CONFIG, GENERATION], revision=revision)
    described = read_config(folder, length)[2]
    return described.config if isinstance(described, Composition) and not described.layers else described


def read_config(folder: Folder, length: int | None) -> tuple[Family, Keys, Any]:
    """The family of a checkpoint, its config.json, and what the family reads there: a configuration or a composition.

    Raises as `load_model` does where config.json, generation_config.json or `length` is refused.
    """
    if length is not None and (type(length) is not int or length < 1):
        raise ArgumentError(f"length: expected None or a whole number of at least 1, got {length!r}")
    file = folder.get(CONFIG)
    content = read_object(file)
    generation = folder.find(GENERATION)
    overriding = Keys({} if generation is None else read_object(generation), generation or file)
    keys = Keys(content, file, length=length)
    if (reason := REFUSED.get(str(content.get("model_type")))) is not None:
        raise keys.refusal("model_type", reason)
    of_type = [each for each in FAMILIES if each.model_type == content.get("model_type")]
    if not of_type:
        names = ", ".join(sorted({each.model_type for each in FAMILIES}))
        raise ConfigurationError(f"{keys.refusal('model_type', 'a supported family')}; these are {names}")
    family = next((each for each in of_type if each.applies(keys)), None)
    if family is None:
        raise keys.refusal("architectures", f"a list with one of {sorted(each.architecture for each in of_type)}")
    described = family.read(keys, overriding)
    check_size(described, file)
    return family.laid_out(described), keys, described

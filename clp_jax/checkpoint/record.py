"""``clp.json`` of a checkpoint as it is read: of a form that everybody who asks for something in it can rely on."""

from typing import Any

from etils import epath

from clp_jax.editable_json import typed
from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.plan import PrunePlan
from clp_jax.processing.conventions import LONGEST

SCHEMA = 1
_LENGTHS = ("action_horizon", "max_token_len")
_OF_STEPS = {
    "source": str,
    "source_fingerprint": str,
    "criterion": str,
    "config": dict,
    "calibration": dict,
    "healed": dict,
}


def read_record(file: epath.Path) -> dict[str, Any]:
    """Reads a ``clp.json``.

    Args:
      file: to read.

    Returns:
      Its content: ``schema``, a valid ``plan``, ``steps`` that are objects with a ``command`` and perhaps a valid
      ``plan`` or valid ``cuts``, and perhaps the object ``training``; what else is in it is kept as it is.

    Raises:
      InputError: it is damaged or of another version.
    """
    record = read_json_object(file, finite=True)
    schema = record.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise InputError(f"{file} has schema {schema}, this version of clp_jax reads {SCHEMA}; install a later one")
    try:
        for key in ("schema", "plan", "steps"):
            if key not in record:
                raise InputError(f"it lacks {key!r}")
        if typed(record["schema"], int, "schema") != SCHEMA:
            raise InputError(f"it has schema {record['schema']}, this version reads {SCHEMA}")
        PrunePlan.from_json(record["plan"])
        for number, step in enumerate(typed(record["steps"], list, "steps")):
            _check_step(step, f"step {number}")
        if record.get("training") is not None:
            typed(record["training"], dict, "training")
    except InputError as error:
        raise InputError(f"{file} is damaged: {error}; copy the checkpoint again") from None
    return record


def _check_step(step: Any, where: str) -> None:
    if "command" not in typed(step, dict, where):
        raise InputError(f"{where} lacks 'command'")
    typed(step["command"], str, f"command of {where}")
    for key, wanted in _OF_STEPS.items():
        if step.get(key) is not None:
            typed(step[key], wanted, f"{key} of {where}")
    config = step.get("config") or {}
    for key in _LENGTHS:
        if config.get(key) is not None and not 1 <= typed(config[key], int, f"{key} of {where}") <= LONGEST:
            raise InputError(f"{key} of {where} is {config[key]}")
    scale = config.get("lora_scale")
    if not isinstance(scale, int | float | None) or isinstance(scale, bool):
        raise InputError(f"lora_scale of {where} is {scale!r}")
    if not isinstance(config.get("state_in_prompt"), bool | None):
        raise InputError(f"state_in_prompt of {where} is {config['state_in_prompt']!r}")
    _check_healed(step.get("healed") or {}, where)
    _check_plans(step, where)


def _check_plans(step: dict[str, Any], where: str) -> None:
    plans = [] if step.get("plan") is None else [step["plan"]]
    try:
        for plan in (*plans, *typed(step.get("cuts") or [], list, "cuts")):
            PrunePlan.from_json(plan)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_healed(healed: dict[str, Any], where: str) -> None:
    for block in typed(healed.get("blocks", []), list, f"healed blocks of {where}"):
        typed(block, dict, f"a healed block of {where}")
    for name, loss in typed(healed.get("loss", {}), dict, f"loss of {where}").items():
        if not isinstance(loss, int | float) or isinstance(loss, bool):
            raise InputError(f"{name} loss of {where} is {loss!r}")

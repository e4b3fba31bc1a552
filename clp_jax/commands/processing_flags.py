"""Flags between a robot and a model, in a module that needs no JAX: simulators live without it."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessingFlags:
    """What stands between a robot and a model."""

    prompt: str | None = None
    """Instruction for every observation, instead of the data set's tasks."""
    tokenizer: str | None = None
    """PaliGemma's SentencePiece .model; else the checkpoint's, a cached or the public one."""
    fast_tokenizer: str | None = None
    """Folder of the tokenizer of actions, where actions are tokens; else the checkpoint's, a cached or the public one
    (physical-intelligence/fast)."""
    norm_stats: str | None = None
    """A norm_stats.json, or the word data to compute them from it; else the checkpoint's, computed if it has none."""
    asset_id: str | None = None
    """Name of the statistics in the checkpoint's assets: which to take, and where they are saved."""
    action_horizon: int | None = None
    """Actions of a chunk. Default: as the checkpoint was trained, or of openpi's configuration; else 50, or 32 where
    actions are tokens."""
    max_token_len: int | None = None
    """Tokens of a prompt. Default: as for --action-horizon; else 48 for pi0, 200 for pi0.5 and, the actions included,
    250 for pi0-FAST, as in openpi."""
    long_prompts: Literal["cut", "refuse"] = "cut"
    """Prompts with more tokens: cut, as upstream does, with a warning that names them, or refused."""
    state_in_prompt: bool | None = None
    """Whether the prompt spells the state. Default: as for --action-horizon; else only that of pi0.5."""

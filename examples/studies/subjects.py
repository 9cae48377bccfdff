"""The embedded pipelines that the studies learn and measure on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Subject:
    """A pipeline, and how it is called.

    Attributes:
        config: YAML file of the distillation of its DyWeight tables.
    """

    name: str
    config: str
    call: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(ROOT / "examples" / self.name)

    @property
    def held_out(self) -> str:
        """Prompts that nothing was learned from."""
        return str(ROOT / "examples" / "prompts" / "emoji-held-out.txt")


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("emoji-sd", "emoji_sd_dyweight.yaml", {"guidance_scale": 1.0}),
        Subject("emoji-flow", "emoji_flow_dyweight.yaml", {"height": 64, "width": 64, "max_sequence_length": 28}),
    )
}

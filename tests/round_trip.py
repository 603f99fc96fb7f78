"""A head written for an engine and read back: the same config and the same tensors."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file

from fledge.drafters.eagle3.config import from_json
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.head_files import WEIGHTS, save_draft
from fledge.export.convert import convert_head, export_head
from fledge.export.settings import ConvertSettings, ExportSettings


def there_and_back(draft: DraftModel, layout: str, folder: Path) -> Path:
    """The folder that was written for the engine."""
    head, out, back = folder / "head", folder / "out", folder / "back"
    save_draft(draft, head, dtype=torch.float32)
    export_head(ExportSettings(head=str(head), to=layout, output_dir=out, target="T"))
    convert_head(ConvertSettings(head=str(out), output_dir=back))
    after = from_json(back / "config.json")
    assert dataclasses.replace(after, target_layers=draft.config.target_layers) == draft.config
    before, kept = load_file(head / WEIGHTS), load_file(back / WEIGHTS)
    assert before.keys() == kept.keys() and all(torch.equal(kept[name], one) for name, one in before.items())
    return out

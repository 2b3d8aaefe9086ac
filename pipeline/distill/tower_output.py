"""OUT/model of a distilled tower: one safetensors file in the layout of `qfuxa/qwen3-asr-0.6b-streaming`."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open

from pipeline import redact
from pipeline.distill.tower import TOWER_FILE
from pipeline.distill.training_output import Facts, heldout_table, speech_text
from pipeline.engine.checkpoint import Checkpoint


def fill(best: Path, folder: Path, model: Checkpoint) -> Facts:
    shutil.copyfile(best / TOWER_FILE, folder / TOWER_FILE)
    with safe_open(folder / TOWER_FILE, framework="pt") as file:
        names = file.keys()
        num_weights = sum(file.get_tensor(name).numel() for name in names)
    return {"model": redact.names(model.model_id), "model_revision": model.revision, "num_weights": num_weights}


def card(facts: Facts) -> str:
    """Markdown, from what training.json holds."""
    config = facts["config"]
    blocks = " and ".join(f"{frames / 100:g} s" for frames in sorted(config["block_frames"]))
    titles = {"loss": "loss", "mse": "squared error", "cosine": "1 - cosine", "text": "cross-entropy"}
    table = heldout_table(facts, titles)
    weight, begun = config["text_weight"], config["tower"]
    text = f" + {weight:g} cross-entropy of the model's decoder with the texts" if weight else ""
    name = "/".join(Path(redact.names(begun)).parts[-2:]) if begun else ""
    begin = f", beginning with the causal tower `{name}`" if begun else ""
    return f"""# A causal audio tower for {facts["model"]}

{facts["num_weights"]:,} weights in place of the audio tower of `{facts["model"]}` at `{facts["model_revision"]}`,
distilled from it{begin}: blocks of {blocks}, {config["left_steps"]} steps of left context, {config["steps"]} steps of
{config["accumulate"]} x {config["ray"]["workers"]} batches of {config["batch_audio_s"]:g} s, squared error +
{config["cosine_weight"]:g} (1 - cosine){text}, AdamW at
{config["learning_rate"]:g} with a cosine, seed {config["seed"]}.
Of the examples {100 * config["offset_share"]:g} % began at a position of up to {config["max_offset"]:,}, drawn evenly
in its logarithm.

Speech: {speech_text(facts)}.

## Held-out speech

The loss beside the offline tower's embeddings, and errors (WER, CER where a language has no spaces) of the model's own
decoder after it, heard in blocks of {max(config["block_frames"]) / 100:g} s. In bold: the step that this is, chosen by
{config["best_by"]}.

{table}
"""

"""The card of a quantized checkpoint: what was done to which model, on what, and what it costs."""

from __future__ import annotations

from typing import Any


def card(facts: dict[str, Any]) -> str:
    """Markdown, from what quantize.json holds."""
    config = facts["config"]
    groups = "one scale for each output" if config["format"] == "fp8" else f"groups of {config['group_size']} inputs"
    layers = facts["layers"]
    worst = sorted(layers, key=lambda layer: -layer["error"])
    return f"""# {facts["model_id"]} in {config["format"]}

`{facts["model_id"]}` at `{facts["model_revision"]}`, {len(layers)} linear layers of {facts["num_weights"]:,} weights in
{config["format"]}, {groups}, by {_algorithm(config)} of NVIDIA ModelOpt {facts["versions"]["nvidia-modelopt"]}.
As they were: {", ".join(f"`{pattern}`" for pattern in config["exclude"])}, embeddings, norms and convolutions.

{_usage(config["format"])}

## Bytes

| weights of | bytes |
|---|---|
{_rows((name, f"{count:,}") for name, count in facts["bytes"].items())}

## What it costs

KL divergence from the model as it was, in nats a token of the teacher-forced answers, and their cross-entropy.

| speech | examples | audio | tokens | KL | by language | cross-entropy before | after |
|---|---|---|---|---|---|---|---|
{_rows(_cost(name, facts[name]) for name in ("calibration", "heldout") if facts[name])}

## Calibration

{_calibration(facts)}

## Layers

Error of a layer: the norm of what its outputs are off over the norm of what the weights as they were give for the same
inputs, on the calibration set. Worst: `{worst[0]["name"]}`, {worst[0]["error"]:.4f}.

| layer | outputs x inputs | error |
|---|---|---|
{_rows((f"`{layer['name']}`", f"{layer['num_out']} x {layer['num_in']}", f"{layer['error']:.4f}") for layer in layers)}
"""


def _rows(rows: Any) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _algorithm(config: dict[str, Any]) -> str:
    if config["algorithm"] == "rtn":
        return "rounding to the nearest"
    clip = f", {config['clip_tokens']:,} positions for clipping" if config["algorithm"] == "awq_full" else ""
    return f"{config['algorithm']} (alpha in steps of {config['alpha_step']}{clip})"


def _usage(number: str) -> str:
    if number == "int4":
        return "`engine: {model: .../packed, quantization: int4}` runs it; `fake-quant` and `export` run the same way."
    return (
        f"To compare formats: `engine: {{model: .../fake-quant, quantization: fake_quant}}` runs it at full size. "
        f"Shardscribe has no kernel for {number}."
    )


def _calibration(facts: dict[str, Any]) -> str:
    config, its = facts["config"]["calibration"], facts["calibration"]
    languages = ", ".join(f"{name} {each['num_examples']}" for name, each in its["languages"].items())
    teachers = f", labelled by {', '.join(its['teachers'])}" if its["teachers"] else ""
    unused = " (rounding needs none: only errors are measured on it)" if facts["config"]["algorithm"] == "rtn" else ""
    return (
        f"{', '.join(config['sources'])}{teachers}: {languages} examples of {config['min_s']:g} to {config['max_s']:g} "
        f"s, {its['audio_s'] / 60:.1f} min in all, drawn with seed {config['seed']}, one by one, "
        f"teacher-forced{unused}; {facts['calibrated_s']:.1f} s of work. The examples are named in quantize.json."
    )


def _cost(name: str, its: dict[str, Any]) -> tuple[Any, ...]:
    by_language = ", ".join(f"{language} {kl:.5f}" for language, kl in its["kl_by_language"].items())
    return (
        name,
        len(its["examples"]),
        f"{its['audio_s'] / 60:.1f} min",
        its["num_tokens"],
        f"{its['kl']:.5f}",
        by_language,
        f"{its['ce_before']:.4f}",
        f"{its['ce_after']:.4f}",
    )

"""The model card of the embedded family, written from what training and evaluation left behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.embedded.recipe import PLANS, SEED, TRAIN_SENTENCES
from pipeline.embedded.speech import DIGITS_SOURCE, DIGITS_TEST_SPEAKER, TEST_VARIANTS, TRAIN_VARIANTS
from pipeline.embedded.training import LOG_EVERY
from pipeline.metrics import unit_name

# of the weights that are shipped; a run of the recipe as it stands has none of it
HISTORY = """\
Both trainings were interrupted and went on from their last state. Of the teacher's mixed steps the first 3,900 had 15 %
digits among the examples (as the student's) and 20 % after that; from 7,500 on half of the sentences were spoken at
another tempo and pitch. Four ways to average were scored on the held-out sets, and the plain mean of all three was
taken; two others had 4.1 and 4.3 % in Chinese, where one clip that is taken for English makes 2.2."""

_SETS = {
    "english": "English",
    "vietnamese": "Vietnamese",
    "chinese": "Chinese",
    "digits": "human digits",
    "windows English": "English, joined to 14-28 s",
    "windows Vietnamese": "Vietnamese, joined to 14-28 s",
    "windows Chinese": "Chinese, joined to 14-28 s",
}


def card(work: Path, names: Sequence[str]) -> str:
    """Markdown. Reads `work/<name>/model.safetensors`, `<name>.jsonl` of every checkpoint, and `scores.json`."""
    scores = json.loads((work / "scores.json").read_text())
    shapes = [_shape(work, name) for name in names]
    training = [_training(work, name) for name in names]
    rows = [_row(key, title, [scores[name][key] for name in names]) for key, title in _SETS.items()]
    head = " | ".join(names)
    return f"""# The embedded Qwen3-ASR family

Small true Qwen3-ASR checkpoints (qwen-asr's classes and file format, random initialization, no Qwen weights in them)
that come with Shardscribe so that its demo, tests and benchmarks run anywhere. They know the sentences of three small
grammars and spoken digits, and nothing else: for real speech set `engine.model: Qwen/Qwen3-ASR-0.6B`.

| checkpoint | parameters | audio tower | text | bytes |
|---|---|---|---|---|
{chr(10).join(shapes)}

`embedded/tower` is a causal audio tower for the student; [its card](tower/README.md); made by
`shardscribe family-tower`.

## Held-out error

Substitutions, deletions and insertions over the reference's words (WER; characters for Chinese, CER), language
detected, engine `reference` in float32 with windowed attention, by `pipeline.embedded.evaluation`. In brackets:
recordings whose language was detected wrongly. The shards are in `heldout/`.

| set | recordings | reference | {head} |
|---|---|---|{"---|" * len(names)}
{chr(10).join(rows)}

Every sentence and every voice ({", ".join(TEST_VARIANTS)})
of these sets is absent from training; the digits are of `{DIGITS_TEST_SPEAKER}`, a person never trained on. All are
distorted by chance as in training: a room, a telephone band or an uneven frequency response, noise 10 to 40 dB below
the speech, gain.

## Data

- Speech that espeak-ng 1.51 synthesizes from the grammars in `grammar.py`: {TRAIN_SENTENCES:,} sentences a language,
  {len(TRAIN_VARIANTS)} voice variants, several English accents, northern Vietnamese, Mandarin by way of pinyin. Texts
  and speech are made by the recipe; nothing was recorded.
- Real speech: strings joined from the training part of the Free Spoken Digit Dataset by Zohar Jackson et al.,
  {DIGITS_SOURCE}, 5 of its 6 speakers. The weights, `heldout/digits.tar` and the digit samples are derived from it
  and come under CC BY-SA 4.0.

## Training

`shardscribe family --fsdd DIR`, seed {SEED}; DIR holds the digits as WebDataset shards (`KEY.wav`, `KEY.json` with
`text` and `speaker`). Throw-away CTC heads on the tower and on the decoder's lower half come first, then cross-entropy
with 0.3 of either CTC: single sentences, about 32 s a batch, then everything, 45 s or more a batch. Muon for matrices,
AdamW for the rest, bfloat16 autocast. Where several numbers of mixed steps stand, the learning rate fell to 2 % at each
of them and rose again in between; the weights are the mean of those at these steps.

| checkpoint | CTC steps | single steps | mixed steps | last step | minutes of one core of a busy machine |
|---|---|---|---|---|---|
{chr(10).join(training)}

{HISTORY}

Each checkpoint's `training.jsonl` is its log. Silence gives `language None`; clips are up to 30 s.
"""


def _shape(work: Path, name: str) -> str:
    config = json.loads((work / name / "config.json").read_text())["thinker_config"]
    audio, text = config["audio_config"], config["text_config"]
    with safe_open(work / name / "model.safetensors", "pt") as weights:
        count = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118 - no mapping
    size = (work / name / "model.safetensors").stat().st_size
    return (
        f"| {name} | {count / 1e6:.1f} M | d {audio['d_model']}, {audio['encoder_layers']} layers | hidden "
        f"{text['hidden_size']}, intermediate {text['intermediate_size']}, {text['num_hidden_layers']} layers, "
        f"vocabulary {text['vocab_size']} | {size / 1e6:.1f} MB bfloat16 |"
    )


def _training(work: Path, name: str) -> str:
    lines = [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
    plan, minutes = PLANS[name], sum(LOG_EVERY * line["s_per_step"] for line in lines) / 60
    mixed = ", ".join(f"{step:,}" for step in plan.mixed_steps)
    return f"| {name} | {plan.ctc_steps:,} | {plan.single_steps:,} | {mixed} | {lines[-1]['step']:,} | {minutes:.0f} |"


def _row(key: str, title: str, scores: list[dict[str, Any]]) -> str:
    language = title.partition(",")[0]
    cells = []
    for score in scores:
        counts = score["counts"]
        errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
        cells.append(f"{100 * errors / counts['num_reference']:.2f} % ({score['language_errors']})")
    measure = f"{scores[0]['counts']['num_reference']:,} ({unit_name(language)})"
    return f"| {title} | {scores[0]['num_recordings']} | {measure} | {' | '.join(cells)} |"

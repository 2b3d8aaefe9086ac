from __future__ import annotations

import functools
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qwen_asr import Qwen3ASRModel
from safetensors.torch import load_file, save_file

from pipeline.config import EngineConfig
from pipeline.engine.base import EngineError, EngineFailure, Result
from pipeline.engine.checkpoint import CheckpointError
from pipeline.engine.create import create_engine
from pipeline.engine.reference import ReferenceEngine, install_windowed_attention
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment
from tests.engine.tiny import noise, segment

MAX_NEW_TOKENS = 16
TIMEOUT_S = 60
SECONDS = [0.5, 1.2345, 2.0, 4.71, 7.9, 9.03, 17.5]


def new_engine(checkpoint: Path, **changes: Any) -> ReferenceEngine:
    options = {"name": "reference", "model": str(checkpoint), "device": "cpu", "max_new_tokens": MAX_NEW_TOKENS}
    engine = create_engine(EngineConfig.model_validate(options | changes))
    assert isinstance(engine, ReferenceEngine)
    return engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[ReferenceEngine]:
    engine = new_engine(tiny_checkpoint)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def published(tiny_checkpoint: Path) -> Iterator[ReferenceEngine]:
    engine = new_engine(tiny_checkpoint, attention="published")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def upstream(tiny_checkpoint: Path, engine: ReferenceEngine) -> Any:
    """qwen-asr as it is, but for its end ids: an argument's default, which a small vocabulary does not have."""
    wrapper = Qwen3ASRModel.from_pretrained(str(tiny_checkpoint), max_new_tokens=MAX_NEW_TOKENS)
    tokenizer = wrapper.processor.tokenizer
    end_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    wrapper.model.generate = functools.partial(
        wrapper.model.generate, eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id
    )
    return wrapper


def hypotheses(results: Sequence[Result]) -> list[Hypothesis]:
    good = [result for result in results if isinstance(result, Hypothesis)]
    assert len(good) == len(results), [result for result in results if not isinstance(result, Hypothesis)]
    return good


def run(engine: ReferenceEngine, segments: Sequence[Segment]) -> list[Hypothesis]:
    return hypotheses(engine.submit(segments).result(TIMEOUT_S))


@pytest.mark.parametrize("language", [None, "English"])
@pytest.mark.parametrize("context", ["", "fox, lazy dog 你好"])
def test_text_is_that_of_qwen_asr(
    published: ReferenceEngine, upstream: Any, language: str | None, context: str
) -> None:
    segments = [segment(seconds, seed, language, context) for seed, seconds in enumerate(SECONDS)]
    found = run(published, segments)
    for one, got in zip(segments, found, strict=True):
        audio = (one.pcm.astype(np.float32) / 32768, SAMPLE_RATE_HZ)
        expected = upstream.transcribe([audio], context=context, language=language)[0]
        assert (got.text, got.language) == (expected.text, expected.language)
    assert len({got.text for got in found}) > len(found) // 2, "the fixture's model does not listen"


def test_forced_language_and_context_reach_the_model(engine: ReferenceEngine) -> None:
    variants = [segment(3, 1), segment(3, 1, "English"), segment(3, 1, "Chinese"), segment(3, 1, context="fox")]
    found = run(engine, variants)
    assert len({tuple(got.token_ids) for got in found}) == 4
    assert [got.language for got in found] == ["", "English", "Chinese", ""]
    assert run(engine, [segment(3, 1, "eNGLISH")])[0].token_ids == found[1].token_ids


def test_configured_language_and_context_stand_for_every_segment(
    tiny_checkpoint: Path, engine: ReferenceEngine
) -> None:
    configured = new_engine(tiny_checkpoint, language="english", context="fox")
    found = run(configured, [segment(3, 1, "Chinese"), segment(3, 1, context="dog")])
    configured.close()
    expected = run(engine, [segment(3, 1, "English", "fox"), segment(3, 1, "English", "dog")])
    assert [got.token_ids for got in found] == [want.token_ids for want in expected]


def test_logprobs_are_those_of_a_teacher_forced_pass(published: ReferenceEngine, upstream: Any) -> None:
    for seed, seconds in enumerate([1.0, 3.3, 9.0]):
        (got,) = run(published, [segment(seconds, seed)])
        audio = noise(seconds, seed).astype(np.float32) / 32768
        prompt = upstream._build_text_prompt("", None)
        inputs = upstream.processor(text=[prompt], audio=[audio], return_tensors="pt", padding=True)
        chosen = torch.tensor([got.token_ids])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], chosen], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = upstream.model.thinker(**inputs).logits[0, -len(got.token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, chosen.T)[:, 0]
        assert got.token_logprobs == pytest.approx(expected.tolist(), abs=1e-3)
        assert logits.argmax(-1).tolist() == got.token_ids


def test_neither_batch_nor_neighbours_change_a_text(tiny_checkpoint: Path, engine: ReferenceEngine) -> None:
    segments = [segment(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    together = run(engine, segments)
    single = new_engine(tiny_checkpoint, batch_size=1)
    alone = run(single, segments)
    single.close()
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-3)


def test_submissions_from_many_threads_come_back_in_order(engine: ReferenceEngine) -> None:
    expected = run(engine, [segment(1 + seed / 3, seed) for seed in range(12)])
    found: dict[int, list[Hypothesis]] = {}

    def work(thread: int) -> None:
        mine = [segment(1 + seed / 3, seed) for seed in range(thread, 12, 4)]
        found[thread] = run(engine, mine)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for index in range(4):
        assert [got.token_ids for got in found[index]] == [want.token_ids for want in expected[index::4]]


def test_windows_are_each_encoded_alone(tiny_checkpoint: Path) -> None:
    windowed, full = (Qwen3ASRModel.from_pretrained(str(tiny_checkpoint)).model.thinker.audio_tower for _ in range(2))
    install_windowed_attention(windowed)

    def encode(tower: Any, mel: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tower(mel, feature_lens=torch.tensor([mel.shape[1]])).last_hidden_state  # type: ignore[no-any-return]

    mel = torch.randn(128, 2057, generator=torch.Generator().manual_seed(0))
    short = mel[:, :800]
    assert torch.equal(encode(windowed, short), encode(full, short))
    alone = torch.cat([encode(full, window) for window in torch.split(mel, 800, dim=1)])
    assert (encode(windowed, mel) - alone).abs().max() < 1e-5
    assert (encode(full, mel) - alone).abs().max() > 1e-2


def test_attention_matters_beyond_eight_seconds_only(engine: ReferenceEngine, published: ReferenceEngine) -> None:
    segments = [segment(seconds, seed) for seed, seconds in enumerate([2.0, 8.0, 20.0])]
    windowed, full = run(engine, segments), run(published, segments)
    assert [got.token_ids for got in windowed[:2]] == [got.token_ids for got in full[:2]]
    assert windowed[2].token_ids != full[2].token_ids
    assert (engine.info.attention, published.info.attention) == ("windowed", "published")


def test_end_tokens_of_the_checkpoint_are_honoured(
    tiny_checkpoint: Path, tmp_path: Path, engine: ReferenceEngine
) -> None:
    (free,) = run(engine, [segment(2.0, 2)])
    assert free.finish_reason == "length"
    assert len(free.token_ids) == MAX_NEW_TOKENS
    end = free.token_ids[4]
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    stopping = new_engine(folder)
    (got,) = run(stopping, [segment(2.0, 2)])
    stopping.close()
    first = free.token_ids.index(end)
    assert got.finish_reason == "stop"
    assert got.token_ids == free.token_ids[: first + 1]
    assert len(got.token_logprobs) == first + 1


@pytest.mark.parametrize(
    ("raw", "language", "text"),
    [
        ("language English<asr_text>the fox", "English", "the fox"),
        ("language Chinese<asr_text>你好", "Chinese", "你好"),
        ("language None<asr_text>", "", ""),
        ("", "", ""),
    ],
)
def test_language_is_read_from_what_the_model_writes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, raw: str, language: str, text: str
) -> None:
    speaking = new_engine(tiny_checkpoint)
    tokenizer = speaking._loaded.processor.tokenizer
    tokens = tokenizer(raw + "<|im_end|>")["input_ids"]

    def generate(input_ids: torch.Tensor, logits_processor: Any, **_: Any) -> Any:
        for token in tokens:
            logits_processor(input_ids, torch.zeros(1, 320).index_fill(1, torch.tensor([token]), 5.0))
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor([tokens])], dim=1))

    monkeypatch.setattr(speaking._loaded.model, "generate", generate)
    (got,) = run(speaking, [segment(1)])
    speaking.close()
    assert (got.language, got.text, got.text_raw, got.finish_reason) == (language, text, raw, "stop")
    assert got.token_ids == tokens
    assert got.token_logprobs == pytest.approx([5 - np.log(np.exp(5) + 319)] * len(tokens))


def test_nothing_and_very_little_audio_is_padded_to_half_a_second(engine: ReferenceEngine) -> None:
    empty, little, half = run(
        engine, [Segment(name, np.zeros(length, np.int16)) for name, length in [("a", 0), ("b", 1), ("c", 8000)]]
    )
    assert empty.token_ids == little.token_ids == half.token_ids


def test_segments_that_cannot_run_fail_by_name_and_alone(engine: ReferenceEngine) -> None:
    results = engine.submit(
        [
            segment(1, 1),
            segment(1, 2, "Klingon"),
            segment(1, 3, context="say <|audio_pad|>"),
            Segment("hours", np.zeros(1201 * SAMPLE_RATE_HZ, np.int16)),
            segment(2, 4),
        ]
    ).result(TIMEOUT_S)
    assert isinstance(results[0], Hypothesis) and isinstance(results[4], Hypothesis)
    failures = [result for result in results if isinstance(result, EngineFailure)]
    assert [failure.code for failure in failures] == ["unsupported_language", "bad_context", "segment_too_long"]
    assert failures[0].segment_id == "noise-1-2"
    assert "'Klingon' is no language of this model; it knows Chinese, English," in failures[0].detail


def test_a_segment_that_the_model_chokes_on_fails_alone(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choking = new_engine(tiny_checkpoint)
    tower = choking._loaded.model.thinker.audio_tower

    def choke(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] == 300:
            raise RuntimeError("bad kernel")

    tower.register_forward_pre_hook(choke)
    results = choking.submit([segment(seconds) for seconds in (2, 3, 4)]).result(TIMEOUT_S)
    choking.close()
    assert results[1] == EngineFailure("noise-3-0", "engine_error", "RuntimeError: bad kernel")
    assert isinstance(results[0], Hypothesis) and isinstance(results[2], Hypothesis)


def test_nan_logits_are_a_failure_not_a_text(tiny_checkpoint: Path) -> None:
    broken = new_engine(tiny_checkpoint)
    with torch.no_grad():
        broken._loaded.model.thinker.model.norm.weight[0] = float("nan")
    (result,) = broken.submit([segment(1)]).result(TIMEOUT_S)
    broken.close()
    assert isinstance(result, EngineFailure) and result.code == "not_finite"


def test_info_says_what_runs(engine: ReferenceEngine, tiny_checkpoint: Path) -> None:
    info = engine.info
    assert (info.engine, info.model_id, info.quantization) == ("reference", str(tiny_checkpoint), "none")
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert len(info.model_revision) == 40
    stored = load_file(tiny_checkpoint / "model.safetensors")
    assert info.num_parameters == sum(tensor.numel() for tensor in stored.values())


def test_half_precision_runs(tiny_checkpoint: Path) -> None:
    half = new_engine(tiny_checkpoint, dtype="bfloat16")
    (got,) = run(half, [segment(2)])
    half.close()
    assert half.info.dtype == "bfloat16"
    assert len(got.token_logprobs) == len(got.token_ids)


def test_loading_and_running_log_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    generation = json.loads((folder / "generation_config.json").read_text())
    sampling = {"do_sample": False, "temperature": 1e-6, "top_k": 1}  # left over; transformers warns of such
    (folder / "generation_config.json").write_text(json.dumps(generation | sampling))
    records: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [_Collector(records)])
    quiet = new_engine(folder)
    run(quiet, [segment(1), segment(2)])
    quiet.close()
    assert records == []


class _Collector(logging.Handler):
    def __init__(self, records: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record.getMessage())


def test_wrong_options_are_refused_at_the_start(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="'Elvish' is no language of this model"):
        new_engine(tiny_checkpoint, language="Elvish")
    with pytest.raises(ValueError, match=r"context holds <\|im_end\|>"):
        new_engine(tiny_checkpoint, context="a <|im_end|>")


def test_missing_tensors_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["thinker.audio_tower.proj2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lack 1 tensors of the model, such as thinker.audio_tower.proj2.weight"):
        new_engine(folder)


def test_a_closed_engine_refuses(tiny_checkpoint: Path) -> None:
    engine = new_engine(tiny_checkpoint)
    pending = engine.submit([segment(1)])
    engine.close()
    hypotheses(pending.result(0))
    with pytest.raises(EngineError, match="after close"):
        engine.submit([segment(1)])

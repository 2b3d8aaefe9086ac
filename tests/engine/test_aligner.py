"""Word times around an engine, with a random forced aligner of 72,000 parameters: shapes and order, not accuracy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from qwen_asr.core.transformers_backend import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

from pipeline.config import EngineConfig
from pipeline.embedded.checkpoint_files import save_checkpoint, save_tokenizer
from pipeline.engine.aligner import AlignedEngine
from pipeline.engine.base import EngineError, EngineFailure, EngineInfo, Result
from pipeline.engine.checkpoint import CheckpointError
from pipeline.schema import Hypothesis, Segment
from tests.engine.tiny import TEXTS, build_checkpoint, segment


@pytest.fixture(scope="module")
def aligner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the aligner's classes: as ASR, but with 100 time steps of 80 ms in place of the vocabulary."""
    folder = build_checkpoint(tmp_path_factory.mktemp("aligner"))
    tokenizer = save_tokenizer(folder, TEXTS * 3, 320)
    tokenizer.add_tokens(["<timestamp>"], special_tokens=True)
    config = json.loads((folder / "config.json").read_text())
    thinker = config["thinker_config"] | {"model_type": "qwen3_forced_aligner", "classify_num": 100}
    thinker["tie_word_embeddings"] = thinker["text_config"]["tie_word_embeddings"] = False
    thinker["text_config"]["vocab_size"] = 384
    config |= {
        "thinker_config": thinker,
        "tie_word_embeddings": False,
        "timestamp_token_id": tokenizer.convert_tokens_to_ids("<timestamp>"),
        "timestamp_segment_time": 80.0,
    }
    torch.manual_seed(0)
    model = Qwen3ASRForConditionalGeneration(Qwen3ASRConfig(**config))
    save_checkpoint(folder, model, tokenizer, torch.float32)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["thinker_config"]["model_type"] = "qwen3_forced_aligner"  # transformers writes the class's own
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


class Engine:
    """Answers with the texts it was given."""

    info = EngineInfo("reference", "tiny", "r", "none", "float32", "cpu", "windowed", 1)

    def __init__(self, *results: Result | Exception) -> None:
        self.results = results

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        future: Future[list[Result]] = Future()
        if isinstance(self.results[0], Exception):
            future.set_exception(self.results[0])
        else:
            future.set_result(list(self.results))  # type: ignore[arg-type]
        return future

    def close(self) -> None: ...


def said(text: str, language: str = "English") -> Hypothesis:
    return Hypothesis(text, text, language, [1], [-0.1], "stop")


def words_of(aligner: Path, segments: list[Segment], *results: Result | Exception, **options: object) -> list[Result]:
    config = EngineConfig.model_validate({"aligner": str(aligner), **options})
    engine = AlignedEngine(Engine(*results), config)
    try:
        return engine.submit(segments).result()
    finally:
        engine.close()


def test_every_word_of_a_text_gets_times_in_order(aligner: Path) -> None:
    first, second = words_of(
        aligner, [segment(4), segment(2, 1)], said("The quick, brown fox."), said("你好世界", "Chinese")
    )
    assert isinstance(first, Hypothesis) and isinstance(second, Hypothesis)
    assert [word.word for word in first.words] == ["The", "quick", "brown", "fox"]
    assert [word.word for word in second.words] == list("你好世界")
    for words, seconds in ((first.words, 4.0), (second.words, 2.0)):
        times = [time for word in words for time in (word.start_s, word.end_s)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= seconds


def test_times_do_not_depend_on_the_batch(aligner: Path) -> None:
    segments = [segment(3, seed) for seed in range(4)]
    texts = [said("lazy dog"), said("over the lazy dog"), said("fox"), said("the quick")]
    together = words_of(aligner, segments, *texts)
    assert together == words_of(aligner, segments, *texts, batch_size=1)


def test_what_cannot_be_aligned_keeps_no_words_and_the_rest_goes_on(aligner: Path) -> None:
    failure = EngineFailure("x", "engine_error", "broke")
    segments = [segment(1)] * 5
    results = words_of(aligner, segments, said("xin chào", "Vietnamese"), said(""), said("..."), failure, said("fox"))
    assert [len(r.words) for r in results if isinstance(r, Hypothesis)] == [0, 0, 0, 1] and results[3] is failure


def test_the_engines_failure_is_raised(aligner: Path) -> None:
    with pytest.raises(EngineError, match="the engine broke"):
        words_of(aligner, [segment(1)], EngineError("the engine broke"))


def test_the_aligner_is_recorded_and_a_model_that_is_none_refused(aligner: Path, tiny_checkpoint: Path) -> None:
    info = AlignedEngine(Engine(said("x")), EngineConfig(aligner=str(aligner))).info
    assert info.aligner.startswith(f"{aligner}@") and info.model_id == "tiny"
    with pytest.raises(CheckpointError, match="is no forced aligner; engine.aligner takes"):
        AlignedEngine(Engine(said("x")), EngineConfig(aligner=str(tiny_checkpoint)))

"""Hostile input, case by case: what each ends as. Every recording of an input is a row or part of one clear error.

Two tables hold all of it. `CASES` run here: a name, what makes the input, and the outcome of each of its recordings in
order ("ok", or the reason code of a failed row), or the ConfigError that the plan gives. `ELSEWHERE` names what needs a
store, a job or an engine: by module, the test that does it, and the same outcome.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import re
import struct
import tarfile
import wave
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.config import ConfigError, TranscribeConfig
from pipeline.read import read_units
from pipeline.schema import ERROR_CODES, SAMPLE_RATE_HZ
from pipeline.sources import webdataset
from pipeline.sources.plan import plan, samples
from pipeline.units import Done

Outcome = list[str] | str


def sound(samples: np.ndarray, rate: int = SAMPLE_RATE_HZ, subtype: str = "PCM_16", container: str = "WAV") -> bytes:
    """`samples` float [num_samples] or [num_samples, num_channels] as a file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=container)
    return buffer.getvalue()


def tone(seconds: float = 0.5, rate: int = SAMPLE_RATE_HZ) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * 220 * np.arange(int(seconds * rate)) / rate)


GOOD = sound(tone())


def wav_header(num_data_bytes: int, rate: int = SAMPLE_RATE_HZ) -> bytes:
    return (
        b"RIFF" + struct.pack("<I", 36 + num_data_bytes) + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16) + b"data" + struct.pack("<I", num_data_bytes)
    )  # fmt: skip


def with_samples(*values: float) -> bytes:
    samples = tone().astype(np.float32)
    samples[: len(values)] = values
    return sound(samples, subtype="FLOAT")


def video(with_audio: bool) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        pictures = container.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        if with_audio:
            track = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
            frame = av.AudioFrame.from_ndarray(tone().astype(np.float32)[None], format="fltp", layout="mono")
            frame.sample_rate = SAMPLE_RATE_HZ
            for packet in [*track.encode(frame), *track.encode(None)]:
                container.mux(packet)
        for _ in range(5):
            picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            for packet in pictures.encode(picture):
                container.mux(packet)
        for packet in pictures.encode(None):
            container.mux(packet)
    return buffer.getvalue()


def files(**contents: bytes) -> Callable[[Path], Path]:
    """A folder of files; `a_wav` becomes `a.wav`."""

    def make(folder: Path) -> Path:
        folder = folder / "in"
        folder.mkdir()
        for name, content in contents.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        return folder

    return make


def tar(
    members: Sequence[tuple[str, bytes | str]], cut: int | None = None, zipped: bool = False
) -> Callable[[Path], Path]:
    """A tar of members; a str is the target of a link. `cut` drops so many bytes of its end."""

    def make(folder: Path) -> Path:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = tarfile.SYMTYPE, content
                    archive.addfile(info)
                else:
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        data = buffer.getvalue()
        data = data[: len(data) - cut] if cut else data
        path = folder / ("a.tar.gz" if zipped else "a.tar")
        path.write_bytes(gzip.compress(data, 1) if zipped else data)
        return path

    return make


def sparse_tar(folder: Path) -> Path:
    """10 GB of holes under a name of audio, in 2 KB (the old GNU format), and a good recording behind it."""
    info = tarfile.TarInfo("hole.wav")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    size = tarfile.itn(10 << 30, 12, tarfile.GNU_FORMAT)
    header[386:410] = size + tarfile.itn(0, 12, tarfile.GNU_FORMAT)  # one hole up to the end
    header[483:495] = size
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    good = tarfile.TarInfo("good.wav")
    good.size = len(GOOD)
    path = folder / "sparse.tar"
    path.write_bytes(bytes(header) + good.tobuf() + GOOD + bytes(-len(GOOD) % 512) + bytes(1024))
    return path


def gzip_bomb(folder: Path) -> Path:
    """A recording of 20 MB of zeros in a gzip of 20 kB; the limit is set below it."""
    return tar([("bomb.wav", bytes(20 << 20)), ("good.wav", GOOD)], zipped=True)(folder)


def parquet(table: pa.Table, **options: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pq.write_table(table, folder / "a.parquet", **options)
        return folder / "a.parquet"

    return make


def manifest(*lines: bytes) -> Callable[[Path], Path]:
    """Lines of a manifest beside `good.wav`, half a second."""

    def make(folder: Path) -> Path:
        (folder / "good.wav").write_bytes(GOOD)
        (folder / "m.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return folder / "m.jsonl"

    return make


def entry(**fields: object) -> bytes:
    return json.dumps({"audio_filepath": "good.wav", **fields}).encode()


CASES: list[tuple[str, Callable[[Path], Path], Outcome]] = [
    ("an empty file", files(a_wav=b"", b_wav=GOOD), ["empty_file", "ok"]),
    ("a truncated wav", files(a_wav=GOOD[:-4000]), ["truncated"]),
    ("a truncated flac", files(a_flac=sound(tone(3), container="FLAC")[:9000]), ["truncated"]),
    ("text for audio", files(a_wav=b"This is no audio at all.\n" * 50), ["not_audio"]),
    ("random bytes", files(a_mp3=np.random.default_rng(0).bytes(5000)), ["not_audio"]),
    ("a picture", files(a_mp3=b"\x89PNG\r\n\x1a\n" + bytes(500)), ["not_audio"]),
    ("no samples", files(a_wav=sound(np.zeros(0))), ["no_samples"]),
    ("three samples", files(a_wav=sound(np.zeros(3))), ["ok"]),
    ("NaN and infinite samples", files(a_wav=with_samples(np.nan, np.inf, -np.inf)), ["ok"]),
    ("clipped samples", files(a_wav=with_samples(*[9.0, -9.0] * 500)), ["ok"]),
    ("1 kHz", files(a_wav=sound(tone(1, 1000), 1000)), ["ok"]),
    ("384 kHz", files(a_wav=sound(tone(0.2, 384_000), 384_000)), ["ok"]),
    ("100 Hz", files(a_wav=wav_header(400, 100) + bytes(400)), ["bad_format"]),
    ("32 channels", files(a_wav=sound(np.stack([tone()] * 32, 1))), ["ok"]),
    ("a wrong extension", files(a_mp3=GOOD, b_wav=sound(tone(), container="FLAC")), ["ok", "ok"]),
    ("a video with sound", files(a_mp4=video(True)), ["ok"]),
    ("a video without sound", files(a_mp4=video(False)), ["not_audio"]),
    ("a header that says 20 hours", files(a_wav=wav_header(20 * 3600 * 16_000, 8000) + GOOD[44:]), ["truncated"]),
    ("nothing to read", files(a_pdf=b"%PDF"), "nothing to read there"),
    ("a tar cut in the middle", tar([("a.wav", GOOD), ("b.wav", GOOD)], cut=9000 + 10_240), ["ok", "damaged_tar"]),
    ("a tar that is none", files(a_tar=b"no tar " * 200), ["damaged_tar"]),
    ("an empty tar", tar([]), []),
    ("names with ../", tar([("../../etc/a.wav", GOOD), ("/b.wav", GOOD)]), ["ok", "ok"]),
    ("links in a tar", tar([("a.wav", "/etc/passwd"), ("b.wav", GOOD)]), ["no_audio", "ok"]),
    ("duplicate keys", tar([("a.wav", GOOD), ("a.wav", GOOD)]), ["ok", "ok"]),
    ("keys apart", tar([("a.wav", GOOD), ("b.wav", GOOD), ("a.txt", b"one")]), ["ok", "ok", "no_audio"]),
    ("a sparse member of 10 GB", sparse_tar, ["too_large", "ok"]),
    ("a gzip bomb", gzip_bomb, ["too_large", "ok"]),
    ("a damaged gzip", lambda folder: damaged(tar([("a.wav", GOOD)] * 9, zipped=True)(folder)), "damaged"),
    ("Parquet without the column", parquet(pa.table({"sound": [GOOD]})), "has no column 'audio'; it has sound"),
    ("Parquet of numbers", parquet(pa.table({"audio": [1, 2]})), "column 'audio' is int64; audio is binary"),
    ("Parquet with nulls", parquet(pa.table({"audio": [GOOD, None, b""]})), ["ok", "no_audio", "empty_file"]),
    ("Parquet of one row a group", parquet(pa.table({"audio": [GOOD] * 5}), row_group_size=1), ["ok"] * 5),
    ("Parquet that is none", files(a_parquet=b"PAR1 but not really PAR1"), "is no Parquet file"),
    ("bad JSON", manifest(b"{not json", entry()), ["bad_manifest_line", "ok"]),
    ("not an object", manifest(b"[1]", b"null", b'"x"', entry()), ["bad_manifest_line"] * 3 + ["ok"]),
    ("a negative offset", manifest(entry(offset=-1), entry()), ["bad_manifest_line", "ok"]),
    ("NaN for a duration", manifest(b'{"audio_filepath": "good.wav", "duration": NaN}'), ["bad_manifest_line"]),
    ("an offset past the end", manifest(entry(offset=99.0), entry(offset=0.2)), ["no_samples", "ok"]),
    ("a duration past the end", manifest(entry(offset=0.1, duration=99.0)), ["ok"]),
    ("not UTF-8", manifest(b'{"audio_filepath": "\xff\xfe.wav"}', entry()), ["bad_manifest_line", "ok"]),
    ("a line of 3 MB", manifest(b'{"x": "' + b"a" * (3 << 20) + b'"}', entry()), ["bad_manifest_line"] * 4 + ["ok"]),
    ("a file that is not there", manifest(entry(audio_filepath="none.wav"), entry()), ["missing_file", "ok"]),
    ("a folder for a file", manifest(entry(audio_filepath="."), entry()), ["missing_file", "ok"]),
    ("a name of 5,000 characters", manifest(entry(audio_filepath="a" * 5000), entry()), ["missing_file", "ok"]),
    ("a name with a zero byte", manifest(entry(audio_filepath="a\0b"), entry()), ["bad_manifest_line", "ok"]),
    ("half a character in a name", manifest(entry(audio_filepath="\ud800.wav"), entry()), ["bad_manifest_line", "ok"]),
    ("half a character in a text", manifest(entry(text="\ud800")), ["ok"]),
    ("an offset of 400 digits", manifest(entry(offset=10**400), entry()), ["bad_manifest_line", "ok"]),
    ("an offset of 1e308 seconds", manifest(entry(offset=1e308), entry()), ["bad_manifest_line", "ok"]),
    ("JSON 50,000 lists deep", manifest(b'{"audio_filepath": ' + b"[" * 50_000), ["bad_manifest_line"]),
    ("a manifest whose gzip breaks", lambda folder: gzipped_manifest(folder, cut=20), "its gzip is damaged"),
    ("a file name that is no UTF-8", lambda folder: odd_name(folder), ["ok"]),
    ("a member name that is no UTF-8", tar([("\udcff.wav", GOOD), ("b.wav", GOOD)]), ["ok", "ok"]),
    ("a tar name of 8 GB", lambda folder: endless_name(folder), ["ok", "damaged_tar"]),
    ("damaged pages of Parquet", lambda folder: damaged_pages(folder), ["ok", "damaged_parquet", "ok"]),
    ("packets of noise in a video", lambda folder: noisy_packets(folder), ["corrupt"]),
]  # fmt: skip

EXPIRY = "test_credentials_that_expire_"
ELSEWHERE: dict[str, list[tuple[str, str, Outcome]]] = {
    "test_refused": [
        ("a URL that is not there", "test_one_recording_of_a_manifest", ["missing_file"]),
        ("a URL that denies", "test_one_recording_of_a_manifest", ["permission_denied"]),
        ("a URL that times out, or answers 5xx for ever", "test_one_recording_of_a_manifest", ["unreachable"]),
        ("an input that is missing, denied, silent", "test_a_whole_input", "no such file, access denied, given up"),
        ("a store that is away", "test_a_store_that_is_away_is_no_matter_of_one_recording", "run the same command"),
        ("a host that never was", "test_a_dead_host_ends_the_job_and_does_not_hold_it", "given up"),
        ("credentials that expire over a recording", f"{EXPIRY}are_no_matter_of_a_recording", "have expired"),
        ("a signed URL that expires", "test_a_presigned_url_that_has_expired_is_no_matter_of_a_recording", "expired"),
    ],
    "test_adversity": [
        ("credentials that expire midway", f"{EXPIRY}midway_end_the_job_and_new_ones_go_on", "with new ones"),
        ("a full disk", "test_a_full_disk_ends_the_job_and_room_lets_it_go_on", "Make room"),
        ("two drivers on one output at once", "test_two_drivers_on_one_output_at_once", ["ok"]),
        ("an output of another config", "test_an_output_that_belongs_to_another_configuration", "changed:"),
    ],
    "test_poison": [
        ("a process that dies or never ends", "test_what_kills_its_process_fails_and_everything_else_is_done_once",
         ["crashed_process"]),
    ],
    "test_attempts": [
        ("memory that runs out in a decoder", "test_memory_that_runs_out_in_a_decoder_ends_the_process",
         ["crashed_process"]),
    ],
    "engine.test_batching": [
        ("no memory for an engine", "test_out_of_memory_alone_is_a_failure_of_that_segment", ["out_of_memory"]),
        ("an engine that raises", "test_a_segment_that_fails_takes_no_other_down", ["engine_error"]),
    ],
    "engine.test_reference": [
        ("NaN in a model", "test_nan_logits_are_a_failure_not_a_text", ["not_finite"]),
        ("what a model refuses", "test_segments_that_cannot_run_fail_by_name_and_alone",
         ["unsupported_language", "bad_context", "segment_too_long"]),
    ],
    "test_hostile": [("2 GB row groups", "test_a_row_group_is_never_held_whole", ["ok"])],
    "test_secrets": [("secrets", "test_no_job_leaves_a_secret_anywhere", "REDACTED")],
    "test_fuzz": [("damage of every kind", "test_damage_is_a_row_or_a_clear_error", ["ok"])],
}  # fmt: skip


def damaged(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(bytes(data))
    return path


def gzipped_manifest(folder: Path, cut: int) -> Path:
    path = manifest(entry())(folder).with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(entry() * 50)[:-cut])
    return path


def odd_name(folder: Path) -> Path:
    folder = folder / "in"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.wav")).write_bytes(GOOD)
    return folder


def endless_name(folder: Path) -> Path:
    path = tar([("a.wav", GOOD)])(folder)
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    path.write_bytes(path.read_bytes()[: 512 + len(GOOD) + -len(GOOD) % 512] + header.tobuf(tarfile.GNU_FORMAT))
    return path


def damaged_pages(folder: Path) -> Path:
    """Three row groups of a recording each; the pages of the second are overwritten."""
    path = parquet(pa.table({"audio": [GOOD] * 3}), row_group_size=1, use_dictionary=False)(folder)
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 60] = b"\xff" * 60
    path.write_bytes(data)
    return path


def noisy_packets(folder: Path) -> Path:
    """Sound as ADTS frames, every other one overwritten but for its header."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="adts") as container:
        track = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(20).astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE_HZ, 0
        for packet in [*track.encode(frame), *track.encode(None)]:
            container.mux(packet)
    data, place, number = bytearray(buffer.getvalue()), 0, 0
    while place + 7 < len(data):
        size = (data[place + 3] & 3) << 11 | data[place + 4] << 3 | data[place + 5] >> 5
        if number % 2:
            data[place + 7 : place + size] = np.random.default_rng(number).bytes(size - 7)
        place, number = place + size, number + 1
    return files(a_aac=bytes(data))(folder)


def outcomes(path: Path) -> list[str]:
    """What became of each recording of an input, by its rows to be."""
    config = TranscribeConfig.model_validate({"inputs": [str(path)], "output": "o"})
    return [outcome for split in plan(config.inputs, {}, 1800.0) for outcome in _of_split(split, config)]


def _of_split(split: object, config: TranscribeConfig) -> Iterator[str]:
    for unit in read_units(split, Done(), config):  # type: ignore[arg-type]
        for recording in unit.recordings:
            yield "ok" if recording.error is None else recording.error.partition(":")[0]


@pytest.mark.parametrize(("make", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_case(make: Callable[[Path], Path], expected: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_MAX_SPOOLED_BYTES", 10 << 20)
    path = make(tmp_path)
    if isinstance(expected, list):
        assert outcomes(path) == expected
    elif expected == "damaged":
        found = outcomes(path)
        assert found[-1] == "damaged_tar" and set(found[:-1]) <= {"ok"}
    else:
        with pytest.raises(ConfigError, match=expected):
            outcomes(path)


def test_a_wave_file_of_the_standard_library_is_read(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16_000))
    assert outcomes(tmp_path) == ["ok"]


def test_a_row_group_is_never_held_whole(tmp_path: Path) -> None:
    """An eighth of a gigabyte stands for two: what is held are a batch and a page, which no reader can divide."""
    recording = wav_header(1 << 20) + bytes(1 << 20)
    options = {"use_dictionary": False, "compression": "zstd", "write_batch_size": 4}
    path = parquet(pa.table({"audio": [recording] * 128}), **options)(tmp_path)
    assert pq.read_metadata(path).num_row_groups == 1
    config = TranscribeConfig.model_validate({"inputs": [str(path)], "output": "o"})
    (split,) = plan(config.inputs, {}, 1800.0)
    before, most, num_samples = pa.total_allocated_bytes(), 0, 0
    for sample in samples(split, {}):
        num_samples += sample.error is None
        most = max(most, pa.total_allocated_bytes() - before)
    assert num_samples == 128 and most < 64 << 20, f"{most / 1e6:.0f} MB"


def test_every_case_elsewhere_is_a_test() -> None:
    for module, cases in ELSEWHERE.items():
        nodes = ast.walk(parsed(f"tests/{module.replace('.', '/')}.py"))
        tests = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        assert {function for _, function, _ in cases} <= tests


def test_every_reason_code_is_met_by_a_case() -> None:
    outcomes = [case[2] for case in [*CASES, *chain(*ELSEWHERE.values())]]
    assert {code for each in outcomes if isinstance(each, list) for code in each} == {"ok", *ERROR_CODES}


def test_every_reason_code_of_the_source_is_declared() -> None:
    """A code begins an error's text, or is an argument of one of the errors that have a code, or is called `code`."""
    files = (path.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py"))
    files = (file for file in files if "distill" not in file.parts)  # which writes no rows
    assert {code for file in files for code in codes_in(parsed(str(file)))} == set(ERROR_CODES)


ROOT = Path(__file__).parent.parent
CODED = ("AudioError", "SegmentError", "EngineFailure", "FileUnavailableError")


def parsed(file: str) -> ast.AST:
    return ast.parse((ROOT / file).read_text())


def codes_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in CODED:
            yield from (text for text in strings(node.args) if re.fullmatch("[a-z]+(_[a-z]+)*", text))
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "code":
            choice = node.value
            yield from strings([choice.body, choice.orelse] if isinstance(choice, ast.IfExp) else [choice])
        elif isinstance(node, ast.Constant):
            yield from (text.partition(":")[0] for text in strings([node]) if re.match("[a-z]+_[a-z_]+: ", text))


def strings(nodes: Sequence[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]

"""The logic of `make bench-gpu`, with a tiny model on the CPU."""

from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import TINY, Figures, GpuResults, Load
from benchmarks.machine import machine


def results(**changes: object) -> GpuResults:
    fields = {
        "commit": "c",
        "machine": machine(),
        "device": "cpu",
        "versions": {},
        "shape": dict(TINY),
        "dtype": "float32",
        "flash_attention": False,
        "weight_bytes": 1000,
        "kv_bytes_per_token": 10,
        "copy_bytes_per_s": 1e4,
        "rows": [],
    }
    return GpuResults(**{**fields, **changes})


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "no CUDA device" in printed.err


def test_every_server_is_measured_under_every_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "deep" / "gpu.json"
    assert gpu.main(["--tiny", "--answer", "6", "--out", str(out)]) == 0
    written = msgspec.json.decode(out.read_bytes(), type=GpuResults)
    assert [(row.server, row.load.streams) for row in written.rows] == [
        ("transformers generate_batch", 1),
        ("transformers generate_batch", 3),
        ("tailrace", 1),
        ("tailrace", 3),
    ]
    assert [row.error for row in written.rows] == [None] * 4
    assert all(row.decode_tokens_per_s > 0 and row.bandwidth_share > 0 for row in written.rows)


def test_decode_is_measured_while_all_streams_decode() -> None:
    # The second stream starts at 2; the first ends at 5. In between 3 seconds with 2 tokens each.
    times = [[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0]]
    row = gpu.figures("x", Load(2, 20, 5), 0.0, times, results())
    assert row.decode_tokens_per_s == 2.0
    assert row.step_s == 1.0
    assert row.first_token_s == 2.0
    assert row.tokens_per_s == pytest.approx(10 / 6)
    # Contexts of 20 + 5 - 1.5 tokens on average.
    assert row.bandwidth_share == pytest.approx((1000 + 2 * 23.5 * 10) / 1e4)


def test_streams_that_never_decode_together_are_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="too short"):
        gpu.figures("x", Load(2, 20, 2), 0.0, [[1.0, 2.0], [3.0, 4.0]], results())


def test_a_step_reads_all_weights_but_separate_embeddings() -> None:
    cpu = torch.device("cpu")
    model = gpu.random_model(TINY, torch.float32, cpu)
    table = TINY["vocab_size"] * TINY["hidden_size"] * 4
    assert gpu.weight_bytes(model) == sum(p.nbytes for p in model.parameters()) - table
    tied = gpu.random_model({**TINY, "tie_word_embeddings": True}, torch.float32, cpu)
    assert gpu.weight_bytes(tied) == gpu.weight_bytes(model)
    cache = gpu.engine_of(model, torch.float32, cpu, [Load(1, 8, 8)], False, 64).model_step.cache
    per_token = sum(k[0, 0].nbytes + v[0, 0].nbytes for k, v in zip(cache.keys, cache.values, strict=True))
    assert gpu.kv_bytes_per_token(TINY, torch.float32) == per_token


def test_a_server_that_fails_is_a_row_that_says_why() -> None:
    def run(_prompts: list[list[int]], _answer: int) -> list[list[float]]:
        raise RuntimeError("no room")

    row = gpu._row("x", Load(1, 8, 8), results(), run)
    assert row == Figures("x", Load(1, 8, 8), error="RuntimeError: no room")
    assert "| x | 1 | RuntimeError: no room |" in gpu.table(results(rows=[row]))

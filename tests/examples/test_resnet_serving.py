"""From a trained ResNet to a served one: the same answers after folding, exporting and converting."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("safetensors")
pytest.importorskip("flatbuffers")

import resnet.convert
import resnet.evaluate
import resnet.export
import resnet.model
import resnet.predict
from errors import UsageError
from resnet.data import Pictures, center_crop
from resnet.model import load_model, make_model, save_model
from tests.support import resnet_runs
from tests.support.cases import assert_close
from tests.support.mnist_runs import assert_same_bits
from tests.support.resnet_runs import CLASSES, SIZE, first_bytes
from tests.tools.convert.test_torch_model import torchvision_state

pytestmark = pytest.mark.usefixtures("flax_promotion")
data_dir, one_block_for_each_stage = resnet_runs.data_dir, resnet_runs.one_block_for_each_stage
SIZES = {"width": 4, "num_classes": len(CLASSES), "dtype": "float32"}


def trained_variables(net):
    """Variables as training leaves them: scales are not 0, and means not either."""
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
        low, high = {"scale": (0.5, 1.5), "var": (0.5, 2.0)}.get(kind, (-0.3, 0.3))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(drawn, abstract_variables(net))


def abstract_variables(net):
    images = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    return jax.eval_shape(lambda key: net.init(key, images, train=False), jax.random.key(0))


def abstract_zeros(net):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(net))


@pytest.fixture
def model(tmp_path):
    """A file of a model, the net, and its variables."""
    attributes = {"depth": 18, "small_images": False} | SIZES
    net = make_model(attributes)
    variables = trained_variables(net)
    about = {"model": attributes, "classes": CLASSES, "image_size": SIZE, "center_crop": 0.9}
    save_model(tmp_path / "model.safetensors", variables, about)
    return tmp_path / "model.safetensors", net, variables


def test_a_model_comes_back_from_its_file(model):
    path, net, variables = model
    found, again, about = load_model(path)
    assert found == net
    assert_same_bits(again, variables)
    assert about["classes"] == list(CLASSES)
    path.write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"not a model of train\.py"):
        load_model(path)


def test_a_served_program_answers_as_the_model_does(model, data_dir, tmp_path, capfd):
    path, net, variables = model
    resnet.export.main(path, tmp_path / "served")
    capfd.readouterr()
    pictures = Pictures(data_dir / "val")
    program = jax.export.deserialize(bytearray((tmp_path / "served" / "model.bin").read_bytes()))
    images = np.stack([np.asarray(center_crop(pictures[i][0], SIZE, 0.9)) for i in range(3)])
    expected = np.asarray(jax.nn.softmax(net.apply(variables, images, train=False)))
    assert np.ptp(expected) > 0.1
    for count in (1, 3):
        assert_close(program.call(images[:count]), expected[:count], 1e-4)
    said = predict(tmp_path / "served", *(data_dir / "val" / pictures.names[i] for i in range(3)))
    for line, probabilities in zip(said, expected, strict=True):
        guesses = re.findall(r"(\w+) (0\.\d{4})", line.split(".png: ")[1])
        assert [CLASSES.index(name) for name, _ in guesses] == list(np.argsort(-probabilities)[:5])
        np.testing.assert_allclose([float(p) for _, p in guesses], np.sort(probabilities)[:0:-1], atol=1e-3)


def predict(folder, *pictures):
    """What predict.py says, alone in a folder, with modules out of reach that it does without."""
    (folder / "predict.py").write_bytes(Path(resnet.predict.__file__).read_bytes())
    alone = "import runpy, sys; sys.modules.update(dict.fromkeys(['flax', 'jbn', 'optax', 'grain'])); "
    alone += "runpy.run_path('predict.py', run_name='__main__')"
    command = [sys.executable, "-c", alone, str(folder), *map(str, pictures)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()


def test_what_cannot_be_classified_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["predict.py", str(tmp_path), "a.png"])
    with pytest.raises(SystemExit, match=r"^error: .*No such file.*about\.json"):
        runpy.run_path(resnet.predict.__file__, run_name="__main__")


def test_a_run_that_is_killed_leaves_no_half_of_a_model(model, tmp_path, monkeypatch):
    _, _, variables = model
    path = tmp_path / "model.safetensors"
    resnet.model.save_model(path, variables, {"model": {}})
    whole = path.read_bytes()

    def killed(arrays, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(resnet.model, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        resnet.model.save_model(path, variables, {"model": {}})
    assert path.read_bytes() == whole


def test_every_batch_norm_is_folded(model, capsys):
    _, net, variables = model
    folded = resnet.evaluate.fold(net, variables)
    said = capsys.readouterr().out
    assert "not folded" not in said
    stats = jax.tree.leaves_with_path(folded["batch_stats"])
    assert said.count(" -> ") == len(stats) / 2 == 12
    images, _ = first_bytes(4)
    assert_close(*(net.apply(v, images, train=False) for v in (folded, variables)), 1e-4)


def test_evaluation_tells_what_the_model_gets_right(model, data_dir, tmp_path, monkeypatch, capsys):
    path, net, variables = model
    monkeypatch.setattr(resnet.evaluate, "CALLS", 2)
    top1, top5 = resnet.evaluate.main(path, data_dir / "val", batch_size=8)
    pictures = Pictures(data_dir / "val")
    rows = [pictures[i] for i in range(len(pictures))]
    images = np.stack([np.asarray(center_crop(image, SIZE, 0.9)) for image, _ in rows])
    labels = np.array([label for _, label in rows])
    order = np.argsort(-np.asarray(net.apply(variables, images, train=False)), axis=-1)
    assert top1 == np.mean(order[:, 0] == labels)
    assert top5 == np.mean(np.any(order[:, :5] == labels[:, None], axis=1))
    said = capsys.readouterr().out
    assert f"18 pictures: top 1 {top1:.4f}, top 5 {top5:.4f}" in said
    assert len(re.findall(r"^1 picture\(s\) in \d+\.\d\d ms, (?:as it is|folded)$", said, re.MULTILINE)) == 2
    shutil.copytree(data_dir / "val", tmp_path / "broken")
    (tmp_path / "broken" / "cat" / "0.png").write_text("no picture")
    resnet.evaluate.main(path, tmp_path / "broken", batch_size=8)
    assert "17 pictures: top 1" in capsys.readouterr().out
    shutil.copytree(data_dir / "val", tmp_path / "fewer", ignore=shutil.ignore_patterns("owl"))
    with pytest.raises(
        UsageError, match=r"fewer: its class folders are not the classes of .*model\.safetensors"
    ):
        resnet.evaluate.main(path, tmp_path / "fewer")


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_torchvisions_names_cover_every_net(depth, monkeypatch):
    monkeypatch.setitem(resnet.model.STAGES, 18, (2, 2, 2, 2))
    net = make_model({"depth": depth} | SIZES)
    variables = abstract_zeros(net)
    state_dict = resnet.convert.to_torchvision(variables, depth)
    assert resnet.convert.depth_of(state_dict) == depth
    expected = torchvision_state(resnet.model.STAGES[depth], bottleneck=depth >= 50)
    assert {name for name in state_dict if "num_batches" not in name} == {
        name for name in expected if "num_batches" not in name
    }
    again, attributes = resnet.convert.from_torchvision(state_dict)
    assert make_model(attributes) == net
    assert_same_bits(again["params"], variables["params"])
    assert jax.tree.structure(again["params"]) == jax.tree.structure(variables["params"])


def test_another_net_of_torchvision_is_refused():
    with pytest.raises(UsageError, match=r"no ResNet-18, 34, 50 or 101: it has \(3, 8, 36, 3\) blocks"):
        resnet.convert.depth_of(torchvision_state((3, 8, 36, 3), bottleneck=True))


def test_a_net_of_other_shapes_is_refused(monkeypatch):
    """A Wide ResNet has the names of a ResNet, and more channels in the middle of its blocks."""
    monkeypatch.setitem(resnet.model.STAGES, 18, (2, 2, 2, 2))
    state_dict = resnet.convert.to_torchvision(trained_variables(make_model({"depth": 18} | SIZES)), 18)
    state_dict["layer1.0.conv1.weight"] = np.zeros((8, 4, 3, 3), np.float32)
    message = r"ResNetBlock_0/Conv_0/kernel is \(3, 3, 4, 8\), and \(3, 3, 4, 4\) in a ResNet-18"
    with pytest.raises(UsageError, match=message):
        resnet.convert.from_torchvision(state_dict)


def test_a_file_of_pytorch_becomes_a_model_and_comes_back(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(resnet.model.STAGES, 18, (2, 2, 2, 2))
    net = make_model({"depth": 18} | SIZES)
    state_dict = resnet.convert.to_torchvision(trained_variables(net), 18)
    state_dict = {name: torch.tensor(np.asarray(array)) for name, array in state_dict.items()}
    torch.save(state_dict, tmp_path / "theirs.pth")
    resnet.convert.main(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    assert (
        json.dumps(load_model(tmp_path / "ours.safetensors")[2]["classes"])
        == '["0", "1", "2", "3", "4", "5"]'
    )
    resnet.convert.main(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    for name, tensor in state_dict.items():
        assert torch.equal(back[name], tensor), name


def test_what_cannot_be_converted_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    theirs, ours = tmp_path / "theirs.pth", tmp_path / "ours.safetensors"
    torch.save([1], theirs)
    with pytest.raises(UsageError, match=r"theirs\.pth: expected a state dict, found a list"):
        resnet.convert.main(theirs, ours)
    net = make_model({"depth": 18, "small_images": True} | SIZES)
    about = {"model": {"depth": 18, "small_images": True} | SIZES}
    save_model(ours, abstract_zeros(net), about)
    with pytest.raises(UsageError, match=r"torchvision has no ResNet that begins as with --small-images"):
        resnet.convert.main(ours, tmp_path / "back.pth")
    plain = resnet.convert.to_torchvision(abstract_zeros(make_model({"depth": 18} | SIZES)), 18)
    torch.save({name: torch.tensor(array) for name, array in plain.items()}, theirs)
    with pytest.raises(UsageError, match=r"--classes .*none: no such folder"):
        resnet.convert.main(theirs, ours, classes=tmp_path / "none")


def test_the_net_is_torchvisions(tmp_path, monkeypatch):
    """The same outputs, where torchvision is installed."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision").models
    monkeypatch.setitem(resnet.model.STAGES, 18, (2, 2, 2, 2))
    for depth, theirs in ((18, models.resnet18()), (50, models.resnet50())):
        for layer in theirs.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.3, 0.3)
                layer.running_var.uniform_(0.5, 2.0)
                torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        variables, attributes = resnet.convert.from_torchvision(theirs.state_dict())
        assert attributes["depth"] == depth
        images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
        mean, std = (np.array(c, np.float32) for c in (resnet.model.PIXEL_MEAN, resnet.model.PIXEL_STD))
        pixels = (images.astype(np.float32) / 255 - mean) / std
        expected = theirs.eval()(torch.tensor(pixels.transpose(0, 3, 1, 2))).detach().numpy()
        found = make_model(attributes).apply(variables, images, train=False)
        assert_close(found, expected, 1e-4)

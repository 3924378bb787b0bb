"""Uses that are unusual but plausible: what cannot work is said before or instead of a wrong result."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    CLIPImageProcessor,
    EarlyStoppingCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTImageProcessor,
)

from hf_efficient import KDFSConfig, KDFSPruner
from hf_efficient.cli import main
from hf_efficient.kdfs.resuming_kdfs import Run


CONFIG = KDFSConfig(target_flops_reduction=0.2)


def resnet(kind=ResNetForImageClassification, **changes):
    torch.manual_seed(0)
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}
    return kind(ResNetConfig(**{**settings, **changes}))


class Weighted(ResNetForImageClassification):
    """With a weight for a class, as for rare ones."""

    def forward(self, pixel_values, labels=None, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        if labels is not None:
            weight = torch.tensor([1.0, 1.0, 9.0, 1.0])
            output.loss = torch.nn.functional.cross_entropy(output.logits, labels, weight=weight)
        return output


def with_nan(rows):
    rows[5]["pixel_values"][0, 0, 0] = float("nan")
    return rows


def with_nan_weight():
    model = resnet()
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (lambda: resnet(num_labels=1), None, r"two labels or more, but has 1"),
        (
            lambda: resnet(Weighted),
            None,
            r"plain cross entropy .* the loss of Weighted is .* as with class weights; show",
        ),
        (with_nan_weight, None, r"`model` must answer with finite logits"),
        (resnet, with_nan, r"diverged while choosing filters: resnet.* lower `learning_rate`, and remove .*training,"),
        (resnet, lambda rows: (row for row in rows), r"read more than once, but a generator is empty after that"),
        (resnet, lambda rows: [{**row, "labels": 1.0} for row in rows], r"`labels` must be whole numbers"),
        (
            resnet,
            lambda rows: [{**row, "labels": [1]} for row in rows],
            r"one class per image, but are not \(0D or 1D",
        ),
        (resnet, lambda rows: [{**row, "labels": "a"} for row in rows], r"a batch has none; where they are words"),
    ],
)
def test_no_wrong_result_in_silence(arguments, toy_data, tmp_path, model, rows, message):
    data = toy_data(size=32)
    with pytest.raises(ValueError, match=message):
        KDFSPruner.from_pretrained(model()).prune(
            tmp_path / "out", CONFIG, rows(data) if rows else data, args=arguments(max_steps=8)
        )
    assert not (tmp_path / "out").exists()


def test_a_name_is_no_network():
    with pytest.raises(ValueError, match=r"classifier, but is a str; load one .* with `KDFSPruner.from_pretrained`"):
        KDFSPruner("microsoft/resnet-50")


class Named(torch.utils.data.Dataset):
    """`format` is a word of its own here."""

    format = "jpeg"

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    """With a length."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


class Iterating(Stream):
    """Its own iterator, which starts anew; its length is not known."""

    def __len__(self):
        raise TypeError("no length")

    def __iter__(self):
        self.rest = iter(self.rows)
        return self

    def __next__(self):
        return next(self.rest)


@pytest.mark.parametrize("kind", [Named, Stream, Iterating])
def test_datasets_of_one_s_own(arguments, toy_data, tmp_path, kind):
    pruner = KDFSPruner.from_pretrained(resnet())
    assert pruner.prune(tmp_path / "out", CONFIG, kind(toy_data(size=32)), args=arguments(max_steps=4)).is_dir()


def test_columns_of_which_images_are_made_are_needed(arguments, toy_data, tmp_path):
    from datasets import Dataset

    def prepare(rows):
        return {"pixel_values": [torch.tensor(image) for image in rows["image"]], "labels": rows["label"]}

    plain = toy_data(size=32)
    data = Dataset.from_list([{"image": row["pixel_values"].numpy(), "label": row["labels"]} for row in plain])
    data.set_transform(prepare)
    for name, train, held_out in (("train_dataset", data, None), ("eval_dataset", plain, {"one": data})):
        with pytest.raises(ValueError, match=rf"`remove_unused_columns=False`, since `{name}` makes .* image, label"):
            KDFSPruner.from_pretrained(resnet()).prune(tmp_path / "out", CONFIG, train, held_out, arguments())
    KDFSPruner.from_pretrained(resnet()).prune(tmp_path / "out", CONFIG, data)  # without arguments it is set
    args = arguments(remove_unused_columns=False, eval_strategy="steps", eval_steps=2)
    KDFSPruner.from_pretrained(resnet()).prune(tmp_path / "out", CONFIG, data, {"one": data}, args)


@pytest.mark.parametrize("steps", [4, -1])
def test_a_dataset_that_fills_no_batch_is_refused(arguments, toy_data, tmp_path, steps):
    args = arguments(max_steps=steps, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"has 4 rows and a batch 8, and `dataloader_drop_last` leaves"):
        KDFSPruner.from_pretrained(resnet()).prune(tmp_path / "out", CONFIG, toy_data(4, size=32), args=args)


def test_one_image_alone_cannot_be_normalised(arguments, toy_data, tmp_path):
    """Two halvings and a pooling leave one pixel of 8."""
    model = resnet(hidden_sizes=[8, 16, 16], depths=[1, 1, 1], downsample_in_first_stage=True)
    pruner = KDFSPruner.from_pretrained(model)
    args = arguments(max_steps=-1, num_train_epochs=2)
    with pytest.raises(ValueError, match=r"has a single image; set `dataloader_drop_last=True`"):
        pruner.prune(tmp_path / "out", CONFIG, toy_data(9, size=16), args=args)


@pytest.mark.parametrize("where", ["checkpoint", "state", "result"])
def test_a_full_disk_is_named_and_the_run_goes_on_after_it(arguments, toy_data, tmp_path, monkeypatch, where):
    save = Trainer._save_checkpoint
    errors = {
        "checkpoint": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "state": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 429824 vs 429712"),
        "result": OSError(28, "No space left on device"),
    }

    def full(trainer, *args, **kwargs):
        if where == "result" or trainer.state.global_step == 1:
            return save(trainer, *args, **kwargs)
        raise errors[where]

    def refuse(*args, **kwargs):
        raise errors[where]

    def prune():
        pruner = KDFSPruner.from_pretrained(resnet())
        args = arguments(save_strategy="steps", save_steps=1, max_steps=6)
        return pruner.prune(tmp_path / "out", CONFIG, toy_data(size=32), args=args)

    folder = "out" if where == "result" else "training.sampling"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", full)
        if where == "result":
            patch.setattr("hf_efficient.kdfs.pruner_kdfs.write_report", refuse)
        with pytest.raises(OSError, match=rf"{folder} cannot be written \(.*start the run again: it goes on from"):
            prune()
    trained = []
    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args: trained.append(1) or step(*args))
    assert (prune() / "model.safetensors").is_file()
    assert len(trained) == (0 if where == "result" else 5)


@pytest.mark.parametrize("phase", ["sampling", "fine_tuning"])
@pytest.mark.parametrize("best", [False, True])
def test_a_phase_that_was_cut_off_after_its_last_step_is_not_trained_further(
    arguments, toy_data, tmp_path, monkeypatch, phase, best
):
    """A step more would change the statistics of the normalisation, with a constant rate the weights as well."""
    data, every = toy_data(size=32), {"save_strategy": "steps", "save_steps": 1}
    if best:
        every.update(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def prune(name):
        pruner = KDFSPruner.from_pretrained(resnet())
        args = arguments(output_dir=str(tmp_path / name), max_steps=6, lr_scheduler_type="constant", **every)
        pruner.prune(tmp_path / f"{name}-out", CONFIG, data, data[:8], args=args)
        return pruner

    whole = prune("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_sampled" if phase == "sampling" else "close", stop)
        with pytest.raises(KeyboardInterrupt):
            prune("cut")
    resumed = prune("cut")
    for name, value in whole.pruned_model.state_dict().items():
        assert torch.equal(value, resumed.pruned_model.state_dict()[name]), name
    losses = [[row["loss"] for row in pruner.history if "loss" in row] for pruner in (whole, resumed)]
    assert losses[0] == losses[1]


def test_another_failure_is_no_full_disk(arguments, toy_data, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "_save_checkpoint", fail)
    args = arguments(save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="a bug"):
        KDFSPruner.from_pretrained(resnet()).prune(tmp_path / "out", CONFIG, toy_data(size=32), args=args)


def test_evaluation_metrics_early_stopping_and_the_best_weights(arguments, toy_data, tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}

    pruner = KDFSPruner.from_pretrained(resnet())
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = arguments(max_steps=40, load_best_model_at_end=True, metric_for_best_model="accuracy", **every)
    stop = EarlyStoppingCallback(
        early_stopping_patience=2, early_stopping_threshold=2.0
    )  # nothing is that much better
    data = toy_data(size=32)
    pruner.prune(tmp_path / "out", CONFIG, data, data[:8], args, compute_metrics=metrics, callbacks=[stop])
    assert set(shapes) == {(8, 4)}
    steps = {
        phase: [row["step"] for row in pruner.history if row["phase"] == phase and "eval_accuracy" in row]
        for phase in ("sampling", "fine_tuning")
    }
    assert steps == {"sampling": [2, 4, 6], "fine_tuning": [2, 4, 6]}, "patience starts anew in each phase"
    assert abs(pruner.report["flops"]["reduction"] - 0.2) < 0.01
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(pruner.masked_model(images).logits, pruner.pruned_model(images).logits)


def write_pictures(folder, make):
    for split in ("train", "test"):
        for label in "abc":
            (folder / split / label).mkdir(parents=True)
            for index in range(3):
                make(index).save(folder / split / label / f"{index}.png")
    return folder


def save_model(folder, processor=None, **changes):
    resnet(num_labels=3, **changes).save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(folder)
    return folder


def prune(tmp_path, model, data, *more):
    words = [
        "prune",
        "--model",
        str(model),
        "--dataset",
        str(data),
        "--output",
        str(tmp_path / "out"),
        "--max-steps",
        "2",
    ]
    return main([*words, "--batch-size", "9", "--target-flops-reduction", "0.2", *more])


def noise(*shape, dtype=np.uint8):
    return Image.fromarray(np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype))


def test_pictures_of_16_bits_are_not_cut_to_white(tmp_path, capsys):
    data = write_pictures(tmp_path / "pictures", lambda index: noise(32, 32, dtype=np.uint16))
    assert prune(tmp_path, save_model(tmp_path / "model"), data) == 2
    said = capsys.readouterr().err
    assert "0.png (mode I;16), of which only the darkest 256 levels would stay; save the pictures with 8 bits." in said


def test_pictures_to_evaluate_on_are_tried_before_the_training(tmp_path, capsys, monkeypatch):
    data = write_pictures(tmp_path / "pictures", lambda index: noise(32, 32, 3))
    noise(32, 32, dtype=np.uint16).save(data / "test" / "a" / "0.png")
    monkeypatch.delattr(Trainer, "train")
    assert prune(tmp_path, save_model(tmp_path / "model"), data) == 2
    assert "0.png (mode I;16), of which only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "more", "message"),
    [
        ({"label": [0.0, 0.5]}, [], "split train, has 0.5 in `label`, which is no number of a class; name"),
        ({"label": [0.0, float("nan")]}, [], "has nan in `label`"),
        ({"label": [0, 1], "photo": ["a.png", "b.png"]}, ["--image-column", "photo"], "but holds values of the type"),
    ],
)
def test_columns_that_hold_something_else_are_refused(tmp_path, capsys, columns, more, message):
    from datasets import Dataset

    data = Dataset.from_dict({"image": [noise(32, 32, 3)] * 2, **columns})
    data.to_parquet(tmp_path / "train.parquet")
    assert prune(tmp_path, save_model(tmp_path / "model"), tmp_path / "train.parquet", *more) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_for_grey_pictures_gets_them(tmp_path, capsys, fits):
    data = write_pictures(tmp_path / "pictures", lambda index: noise(32, 32))
    scale = {"image_mean": [0.5], "image_std": [0.5]} if fits else {}
    model = save_model(
        tmp_path / "model", ViTImageProcessor(size={"height": 32, "width": 32}, **scale), num_channels=1
    )
    assert prune(tmp_path, model, data) == (0 if fits else 2)
    if not fits:
        assert "fails on a picture of mode L (" in capsys.readouterr().err


def test_pictures_that_stay_of_different_sizes_are_refused_in_words(tmp_path, capsys):
    data = write_pictures(tmp_path / "pictures", lambda index: noise(32, 32 + 8 * index, 3))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    assert prune(tmp_path, save_model(tmp_path / "model", processor), data) == 2
    assert "makes (3, 32, 32) of one picture and (3, 32, 48) of another; set a `size`" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["save_to_disk", "one split", "shards", "clone"])
def test_datasets_as_libraries_write_them(tmp_path, kind):
    from datasets import load_dataset

    pictures = write_pictures(tmp_path / "pictures", lambda index: noise(32, 32, 3))
    data, folder = load_dataset("imagefolder", data_dir=str(pictures)), tmp_path / "data"
    folder.mkdir()
    if kind in ("shards", "clone"):
        inner = folder / "data" if kind == "clone" else folder
        for split, rows in data.items():
            rows.to_parquet(inner / f"{split}-00000-of-00001.parquet")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    else:
        (data if kind == "save_to_disk" else data["train"]).save_to_disk(folder)
    assert prune(tmp_path, save_model(tmp_path / "model"), folder, "--quiet") == 0


def test_a_teacher_that_knows_other_colours_is_named(tmp_path, caplog):
    from hf_efficient.kdfs.commands_kdfs import _compare_scales

    data = write_pictures(tmp_path / "pictures", lambda index: noise(32, 32, 3))
    model = save_model(tmp_path / "model")
    own = ViTImageProcessor.from_pretrained(model)
    other = "with mean and deviation ([0.4, 0.4, 0.4], [0.5, 0.5, 0.5])"
    for index, (settings, warning) in enumerate(
        (
            ({"image_mean": [0.5] * 3}, ""),
            ({"image_mean": 0.5, "image_std": 0.5}, ""),  # for all channels
            ({"image_mean": [0.4] * 3}, other),
            ({"do_normalize": False}, "not normalised"),
        )
    ):
        processor = ViTImageProcessor(size={"height": 32, "width": 32}, **settings)
        teacher = save_model(tmp_path / f"teacher{index}", processor)
        caplog.clear()
        _compare_scales(str(teacher), own, {})
        assert ("was trained on images" in caplog.text) == bool(warning)
        assert f"{warning}, but will see those of the model, with mean" in caplog.text or not warning
    caplog.clear()
    assert prune(tmp_path, model, data, "--teacher", str(teacher)) == 0
    assert "not normalised, but will see" in caplog.text

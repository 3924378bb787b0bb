"""Converting: the authors' layout and stock LLaVAs become checkpoints that load whole; wrong folders lose nothing."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_efficient import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, convert_dynamic_llava_checkpoint
from hf_efficient.dynamic_llava import convert_dynamic_llava, weights_dynamic_llava
from hf_efficient.dynamic_llava.convert_dynamic_llava import convert_llava_checkpoint

from .conftest import BACKBONES


SMALL = {
    "predictor_hidden_size": 16,
    "predictor_num_heads": 2,
    "predictor_intermediate_size": 32,
    "predictor_num_layers": 1,
}


def load(folder):
    """The public model, with nothing missing and nothing left over."""
    model, report = DynamicLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def left_behind(folder):
    """What an interrupted conversion into `folder` left beside it."""
    return [path.name for path in folder.parent.iterdir() if "converting" in path.name]


def prompt(image_token_id, features):
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
    ids = torch.tensor([[1, 5, *[image_token_id] * len(features), 7, 9, 11]])
    return {"input_ids": ids, "mm_encoder_outputs": encoded}


# ----------------------------------------------------------------------------------------------- the authors' layout


def test_settings_and_vocabulary(converted, numbers, tensors):
    model, sparse = load(converted), numbers["sparse_config"]
    config = model.config
    wanted = {
        "vision_keep_rate": sparse["vision_keep_rate"],
        "sparse_layer": sparse["sparse_layer"],
        "output_text_min_length": sparse["output_text_len_for_training"],
        "instruct_min_length": sparse["instruct_len_for_training"],
        "predictor_hidden_size": sparse["d_model"],
        "predictor_num_heads": sparse["nhead"],
        "predictor_intermediate_size": sparse["dim_feedforward"],
        "predictor_num_layers": sparse["num_layers"],
        "mask_loss_weight": sparse["mask_loss_weight"],
        "use_instruct_predictor": False,
        "has_instruct_predictor": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": 4,
        "image_token_id": 128,
    }
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.text_config.vocab_size == 192
    assert config.text_config.rope_parameters["rope_theta"] == numbers["config"]["rope_theta"]
    assert config.text_config.use_cache
    assert model.generation_config.suppress_tokens == list(range(128, 192))

    for table, name in (
        (model.get_input_embeddings().weight, "model.embed_tokens"),
        (model.lm_head.weight, "lm_head"),
    ):
        old = tensors[f"weights.{name}.weight"]
        assert torch.equal(table[:128], old)
        torch.testing.assert_close(table[128:], old.mean(dim=0).expand(64, -1))
    instruct = model.model.instruct_score_predictor.output_mlp[1].weight
    assert torch.equal(instruct, tensors["weights.model.instruct_score_predictor.output_mlp.1.weight"])


@torch.no_grad()
def test_a_new_id_is_never_the_greedy_choice(converted, tensors):
    model = load(converted)
    logits = model(**prompt(128, tensors["prompt0.image_features"])).logits
    assert (logits[..., 128:].amax(dim=-1) < logits[..., :128].amax(dim=-1)).all()
    out = model.generate(**prompt(128, tensors["prompt0.image_features"]), max_new_tokens=20, do_sample=True)
    assert out[:, -20:].max() < 128


def test_tower_and_projector(authors_folder, tmp_path):
    """The tower in `mm_vision_tower` and both projector layers, from pixels to features as the parts give them."""
    source = authors_folder(mm_vision_tower=str(tmp_path / "authors" / "tower"))  # the other tests: relative
    model = load(convert_dynamic_llava_checkpoint(source, tmp_path / "new"))
    tower, stored = CLIPVisionModel.from_pretrained(source / "tower"), load_file(source / "model.safetensors")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        states = torch.nn.functional.linear(
            states, stored["model.mm_projector.0.weight"], stored["model.mm_projector.0.bias"]
        )
        wanted = torch.nn.functional.linear(
            torch.nn.functional.gelu(states),
            stored["model.mm_projector.2.weight"],
            stored["model.mm_projector.2.bias"],
        )
        features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    torch.testing.assert_close(torch.stack(list(features)), wanted)


def test_a_linear_projector_stays_linear(authors_folder, tmp_path):
    def linear(stored):
        kept = {name: tensor for name, tensor in stored.items() if "mm_projector" not in name}
        return {**kept, "model.mm_projector.weight": torch.randn(64, 32), "model.mm_projector.bias": torch.randn(64)}

    source = authors_folder(linear, mm_projector_type="linear", mm_vision_select_feature="cls_patch")
    model = load(convert_dynamic_llava_checkpoint(source, tmp_path / "new"))
    stored, states = load_file(source / "model.safetensors"), torch.randn(3, 32)
    wanted = torch.nn.functional.linear(states, stored["model.mm_projector.weight"], stored["model.mm_projector.bias"])
    assert torch.equal(model.model.multi_modal_projector(states), wanted)
    assert (model.config.vision_feature_select_strategy, model.config.image_seq_length) == ("full", 5)


def test_a_tower_in_the_shards_wins_over_the_folder(authors_folder, tmp_path):
    towers = {}

    def with_tower(stored):
        for name, tensor in load_file(tmp_path / "authors" / "tower" / "model.safetensors").items():
            towers[name] = torch.randn_like(tensor)
            key = name.removeprefix("vision_model.")
            stored[f"model.vision_tower.vision_tower.vision_model.{key}"] = towers[name]
        stored["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        return stored

    source = authors_folder(with_tower)
    (source / "tower" / "model.safetensors").unlink()  # the configuration alone is read from there
    model = load(convert_dynamic_llava_checkpoint(source, tmp_path / "new"))
    loaded = model.model.vision_tower.state_dict()
    assert towers
    for name, tensor in towers.items():
        assert torch.equal(loaded[name], tensor), name


def test_the_vision_half_of_a_whole_clip_is_taken(authors_folder, tmp_path):
    source = authors_folder(mm_vision_tower="clip")
    vision = json.loads((source / "tower" / "config.json").read_text())
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=8))
    clip.save_pretrained(source / "clip")
    model = load(convert_dynamic_llava_checkpoint(source, tmp_path / "new"))
    wanted = clip.vision_model.state_dict()
    loaded = model.model.vision_tower.state_dict()
    assert wanted
    for name, tensor in wanted.items():
        assert torch.equal(loaded.get(name, loaded.get(f"vision_model.{name}")), tensor), name


def test_shards_and_dtype(authors_folder, tmp_path, monkeypatch):
    """Three shards in, several out, in the stored dtype; the same tensors as from one file."""
    monkeypatch.setattr(weights_dynamic_llava, "SHARD_BYTES", 100_000)
    source = authors_folder(lambda stored: {name: t.to(torch.bfloat16) for name, t in stored.items()}, shards=3)
    folder = convert_dynamic_llava_checkpoint(source, tmp_path / "new")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == sorted(path.name for path in folder.glob("*.safetensors"))
    shards = {file: load_file(folder / file) for file in files}
    assert all(shards[file][name].dtype == torch.bfloat16 for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())
    model = load(folder)
    assert model.config.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    old = {name: t for number in range(3) for name, t in load_file(source / f"part-{number}.safetensors").items()}
    layer = model.model.language_model.layers[3].mlp.down_proj.weight
    assert torch.equal(layer, old["model.layers.3.mlp.down_proj.weight"])


def test_a_plain_llava_gets_fresh_predictors(authors_folder, tmp_path, caplog):
    source = authors_folder(
        lambda stored: {name: t for name, t in stored.items() if "predictor" not in name},
        sparse_config=None,
        model_type="llava_llama",
    )
    model = load(convert_dynamic_llava_checkpoint(source, tmp_path / "new"))
    assert model.config.predictor_hidden_size == DynamicLlavaConfig.predictor_hidden_size
    assert not model.config.has_instruct_predictor
    weight = model.model.image_score_predictor.down_mlp[1].weight
    assert 0.01 < weight.std() < 0.03
    assert not model.model.image_score_predictor.down_mlp[1].bias.any()


def test_switches(authors_folder, tmp_path, numbers):
    """`use_text_predictor` rules both text switches; the instruct predictor is kept, switched off."""
    sparse = {**numbers["sparse_config"], "use_text_predictor": False, "use_instruct_predictor": True}
    config = load(convert_dynamic_llava_checkpoint(authors_folder(sparse_config=sparse), tmp_path / "new")).config
    assert (config.use_vision_predictor, config.use_output_text_predictor) == (True, False)
    source = tmp_path / "authors" / "config.json"
    written = json.loads(source.read_text())
    written["sparse_config"]["use_text_predictor"] = True
    source.write_text(json.dumps(written))
    config = load(convert_dynamic_llava_checkpoint(source.parent, tmp_path / "newer")).config
    assert config.use_output_text_predictor
    assert config.has_instruct_predictor
    assert not config.use_instruct_predictor


def test_tied_embeddings(authors_folder, tmp_path, tensors):
    source = authors_folder(
        lambda stored: {name: t for name, t in stored.items() if name != "lm_head.weight"}, tie_word_embeddings=True
    )
    model = load(convert_dynamic_llava_checkpoint(source, tmp_path / "new"))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight[:128], tensors["weights.model.embed_tokens.weight"])


def write_tokenizer(folder, words=125, **kwargs):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs
    )
    fast.save_pretrained(folder)


@pytest.mark.parametrize("words", [125, pytest.param(100, marks=pytest.mark.slow)])
def test_processor(authors_folder, tmp_path, words):
    """A question about an image goes in, tokens come out; ids without a token are filled up."""
    source = authors_folder()
    write_tokenizer(source, words)
    folder = convert_dynamic_llava_checkpoint(source, tmp_path / "new")
    processor, model = AutoProcessor.from_pretrained(folder), load(folder)
    assert processor.image_token_id == model.config.image_token_id == 128
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (8, "default")
    assert processor.image_processor.do_pad
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.pad_token_id == 0
    image = Image.new("RGB", (40, 20), "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]
    messages = [[{"role": "user", "content": content}], [{"role": "user", "content": content[:1] + content[1:] * 2}]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "padding": True}
    inputs = processor.apply_chat_template(messages, return_tensors="pt", **options)
    assert (inputs["input_ids"] == 128).sum(dim=1).tolist() == [4, 4]
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    corner, centre = inputs["pixel_values"][0, :, 0, 0], inputs["pixel_values"][0, :, 8, 8]
    assert (corner - centre).abs().max() > 1  # the wide image was padded, not cropped
    text = processor.apply_chat_template(messages[0], add_generation_prompt=True)
    assert text.startswith("A chat between a curious user")
    assert text.endswith("USER: <image>\nw1 w2 ASSISTANT:")
    model.generate(**inputs, max_new_tokens=3)
    assert [len(images) for images in model.last_sparsity.image_index] == [1, 1]


def test_no_processor_without_a_tokenizer(converted):
    assert not list(converted.glob("*token*")) + list(converted.glob("*processor*"))
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_dynamic_llava.py"} <= {
        path.name for path in converted.iterdir()
    }


# ------------------------------------------------------------------------------------------------------ wrong input


def without(name):
    return lambda stored: {key: tensor for key, tensor in stored.items() if key != name}


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (without("model.norm.weight"), {}, "without 1 tensors, in our names first 'language_model.model.norm.weight'"),
        (without("model.output_text_score_predictor.output_mlp.7.bias"), {}, "output_mlp.7.bias"),
        (lambda s: {n: t for n, t in s.items() if "image_score" not in n}, {}, "image_score_predictor"),
        (lambda s: {**s, "model.image_newline": torch.ones(64)}, {}, "no place in it, first 'model.image_newline'"),
        (lambda s: {**s, "model.norm.weight": torch.ones(63)}, {}, r"'model.norm.weight' of shape \(63,\) instead of"),
        (None, {"vocab_size": 127}, "got 128 rows for a `vocab_size` of 127"),
        (None, {"num_hidden_layers": 5}, "without 9 tensors"),
        (None, {"model_type": "llava"}, "use `from_llava`"),
        (None, {"model_type": "llava_mistral"}, "got 'llava_mistral'"),
        (None, {"mm_projector_type": "mlp3x_gelu"}, "must be mlp2x_gelu or linear, got 'mlp3x_gelu'"),
        (None, {"mm_vision_select_feature": "all"}, "must be patch or cls_patch, got 'all'"),
        (None, {"mm_vision_tower": None}, "must name a folder or Hub id of a CLIP vision model, got None"),
        (None, {"vocab_size": "128"}, "`vocab_size` in config.json must be an integer, got '128'"),
        (None, {"mm_vision_tower": "."}, r"must name a CLIP vision model, got '\.'"),
    ],
)
def test_wrong_contents_are_named(authors_folder, tmp_path, change, fields, words):
    with pytest.raises(ValueError, match=words):
        convert_dynamic_llava_checkpoint(authors_folder(change, **fields), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not left_behind(tmp_path / "new")


@pytest.mark.parametrize("tower", ["/does/not/exist", "no/such-tower"])
def test_a_missing_tower_is_named(authors_folder, tmp_path, tower):
    with pytest.raises(FileNotFoundError, match=f"`mm_vision_tower`.*{tower}"):
        convert_dynamic_llava_checkpoint(authors_folder(mm_vision_tower=tower), tmp_path / "new")


@pytest.mark.parametrize(("name", "part"), [("pytorch_model.bin", ""), ("consolidated.00.pth", "tower")])
def test_pickles_are_never_read(authors_folder, tmp_path, name, part):
    """A pickle that would leave a trace if it was loaded."""
    source = authors_folder()
    (source / part / "model.safetensors").unlink()
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    torch.save({"weight": Evil()}, source / part / name)
    with pytest.raises(ValueError, match=f"{name} only: pickled weights are never read"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")
    assert not trace.exists()
    assert not (tmp_path / "new").exists()
    assert not left_behind(tmp_path / "new")


def test_a_pickle_by_another_name_is_not_read(authors_folder, tmp_path):
    source = authors_folder()
    torch.save({}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"must hold whole safetensors files, got .*model\.safetensors"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/elsewhere/x.safetensors", "a\\b.safetensors", "config.json"]
)
def test_names_in_an_index_stay_in_the_folder(authors_folder, tmp_path, name):
    source = authors_folder(shards=2)
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="must hold an index that names safetensors files of its own folder"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")


def test_incomplete_folders_are_named(authors_folder, tmp_path):
    source = authors_folder(shards=2)
    (source / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"every shard of its index, got .* without part-1\.safetensors"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")
    (source / "part-0.safetensors").unlink()
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="with no weights"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must hold valid JSON"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="must be a folder or a Hub id, got '/no/where'"):
        convert_dynamic_llava_checkpoint("/no/where", tmp_path / "new")


def test_destination_is_not_overwritten_by_accident(authors_folder, tmp_path):
    source, folder = authors_folder(), tmp_path / "new"
    folder.mkdir()
    assert convert_dynamic_llava_checkpoint(source, folder) == folder  # empty: fine
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="which holds files"):
        convert_dynamic_llava_checkpoint(source, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    convert_dynamic_llava_checkpoint(source, folder, overwrite=True)
    assert not (folder / "notes.txt").exists()
    load(folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a folder, got the file"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "file", overwrite=True)
    for inside in (source, tmp_path):
        with pytest.raises(FileExistsError, match="must not hold what is converted"):
            convert_dynamic_llava_checkpoint(source, inside, overwrite=True)
    assert (source / "model.safetensors").is_file()


@pytest.mark.parametrize(("moment", "old"), [("write_tensors", False), ("_save_rest", True)])
def test_an_interrupted_conversion_leaves_nothing(authors_folder, tmp_path, monkeypatch, moment, old):
    """Interrupted while weights are written and when all but the last step is done."""
    source, folder = authors_folder(), tmp_path / "new"
    if old:
        convert_dynamic_llava_checkpoint(source, folder)
        (folder / "notes.txt").write_text("mine")
    original = getattr(convert_dynamic_llava, moment)

    def interrupt(*args):
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_dynamic_llava, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_dynamic_llava_checkpoint(source, folder, overwrite=True)
    assert not left_behind(folder)
    assert folder.exists() == old
    if old:
        assert (folder / "notes.txt").read_text() == "mine"
        load(folder)


@pytest.mark.parametrize("words", [126, 130])
def test_a_tokenizer_that_is_too_large_is_refused(authors_folder, tmp_path, words):
    source = authors_folder()
    write_tokenizer(source, words)
    with pytest.raises(ValueError, match=r"at most `vocab_size` \(128\) tokens"):
        convert_dynamic_llava_checkpoint(source, tmp_path / "new")


# ------------------------------------------------------------------------------------------------------ stock LLaVAs


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_stock_llava_loads_with_only_the_predictors_missing(make_llava, tmp_path, backbone):
    llava = make_llava(backbone)
    llava.save_pretrained(tmp_path)
    sparse, report = DynamicLlavaForConditionalGeneration.from_pretrained(
        tmp_path, config=DynamicLlavaConfig(**{**config_of(llava), **SMALL}), output_loading_info=True
    )
    assert report["missing_keys"]
    assert all("_score_predictor." in name for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    loaded = sparse.state_dict()
    assert set(loaded) - set(llava.state_dict()) == set(report["missing_keys"])
    for name, tensor in llava.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def config_of(llava):
    return {name: value for name, value in llava.config.to_dict().items() if name != "model_type"}


@pytest.mark.parametrize(
    "backbone", ["qwen2", *(pytest.param(b, marks=pytest.mark.slow) for b in ("llama", "mistral"))]
)
def test_convert_llava(make_llava, make_batch, word_processor, tmp_path, backbone):
    """Only predictors are added: with them off, the converted files give the stock model's logits, bit by bit."""
    llava = make_llava(backbone)
    llava.save_pretrained(tmp_path / "llava")
    word_processor.save_pretrained(tmp_path / "llava")
    folder = convert_llava_checkpoint(tmp_path / "llava", tmp_path / "new", sparse_layer=1, **SMALL)
    model = load(folder)
    assert model.config.sparse_layer == 1
    assert model.generation_config.suppress_tokens == llava.generation_config.suppress_tokens
    assert 0.01 < model.model.image_score_predictor.down_mlp[1].weight.std() < 0.03
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.patch_size == word_processor.patch_size
    assert processor.tokenizer.get_vocab() == word_processor.tokenizer.get_vocab()

    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    model.config.vision_keep_rate, model.config.use_output_text_predictor = 1.0, False
    batch = make_batch([3, "image", 5], ["image", 2])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)


def test_convert_llava_casts(make_llava, tmp_path):
    make_llava().save_pretrained(tmp_path / "llava")
    folder = convert_llava_checkpoint(tmp_path / "llava", tmp_path / "new", dtype="bfloat16", **SMALL)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert load(folder).config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vision_keep_rate": 1.5}, "`vision_keep_rate` must be a number in"),
        ({"sparse_layer": 9}, "`sparse_layer` must be below the number of decoder layers"),
        ({"keep": 0.2}, "must be sparsity settings, got 'keep'"),
        ({"dtype": "int8"}, "`dtype` must be 'auto' or a floating point dtype such as 'bfloat16', got 'int8'"),
    ],
)
def test_convert_llava_refuses_wrong_settings(make_llava, tmp_path, settings, words):
    make_llava().save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match=words):
        convert_llava_checkpoint(tmp_path / "llava", tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_convert_llava_refuses_other_architectures(authors_folder, tmp_path):
    with pytest.raises(ValueError, match=r"must be a LLaVA-1\.5"):
        convert_llava_checkpoint(authors_folder() / "tower", tmp_path / "new")

"""The three arms of the Dynamic-LLaVA benchmark on one set of weights."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_efficient import DynamicLlavaForConditionalGeneration
from hf_efficient.dynamic_llava.decoder_dynamic_llava import CACHE


ARMS = ("dense", "sparse", "kept")
ANSWER, LONG = 64, 1000  # generated tokens
UNCACHED_STEPS = range(1, ANSWER + 1, ANSWER // 8)  # every eighth one: their costs lie on a line
PRESETS = {
    "small": {
        "text": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 352},
        "vocabulary": 1000,
        "image_tokens": 144,
        "predictor": {"predictor_hidden_size": 64, "predictor_num_heads": 4, "predictor_intermediate_size": 128},
        "rounds": {"prefill": 7, "decode": 1, "uncached": 1, "train": 5},
    },
    "medium": {
        "text": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816},
        "vocabulary": 32000,
        "image_tokens": 576,
        "predictor": {},
        "rounds": {"prefill": 9, "decode": 2, "uncached": 3, "train": 5},
    },
}
TEXT_TOKENS, BEFORE_IMAGE = 64, 5


class Bench:
    """The three arms on one set of weights."""

    def __init__(self, preset: dict):
        torch.manual_seed(0)
        self.image_tokens, vocabulary = preset["image_tokens"], preset["vocabulary"]
        vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        text = LlamaConfig(**preset["text"], vocab_size=vocabulary, max_position_embeddings=4096)
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=vocabulary - 1)
        stock = LlavaForConditionalGeneration(config)
        self.sparse = DynamicLlavaForConditionalGeneration.from_llava(stock, **preset["predictor"]).eval()
        with torch.device("meta"):
            self.dense = LlavaForConditionalGeneration(config).eval()
        own = self.dense.state_dict().keys()  # modules of its own: none of the sparse model's hooks
        weights = {name: tensor for name, tensor in self.sparse.state_dict().items() if name in own}
        self.dense.load_state_dict(weights, assign=True)
        for name, buffer in self.sparse.named_buffers():  # rotary frequencies are in no state dict
            module, _, key = name.rpartition(".")
            self.dense.get_submodule(module).register_buffer(key, buffer, persistent=False)
        words = torch.randint(3, vocabulary - 1, (1, TEXT_TOKENS + LONG))
        image = torch.full((1, self.image_tokens), vocabulary - 1)
        self.ids = torch.cat([words[:, :BEFORE_IMAGE], image, words[:, BEFORE_IMAGE:]], dim=1)
        self.prompt = TEXT_TOKENS + self.image_tokens
        self.features = torch.randn(self.image_tokens, text.hidden_size)
        in_turn = torch.arange(LONG)[None] % 2 == 0
        self.options = {
            "dense": {},
            "sparse": {"text_decisions": in_turn},
            "kept": {"text_decisions": torch.ones_like(in_turn), "vision_keep_tokens": self.image_tokens},
        }

    def call(self, arm: str, ids: torch.Tensor, image: bool = True, **kwargs):
        """One forward pass of an arm."""
        model = self.dense if arm == "dense" else self.sparse
        if image:
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[self.features])}
        return model(input_ids=ids, **self.options[arm], **kwargs)

    def prefill(self, arm: str):
        """Read the prompt."""
        return self.call(arm, self.ids[:, : self.prompt], use_cache=True, logits_to_keep=1)

    def uncached_step(self, arm: str, generated: int):
        """Read the prompt and `generated` tokens for the next one."""
        known = {} if arm == "dense" else {"prompt_length": self.prompt}
        return self.call(arm, self.ids[:, : self.prompt + generated], use_cache=False, logits_to_keep=1, **known)

    def cached_step(self, arm: str, generated: int):
        """Read generated token number `generated` on a live cache."""
        token = self.ids[:, self.prompt + generated - 1, None]
        return self.call(arm, token, image=False, **{CACHE: self.caches[arm]})

    def train_step(self, arm: str) -> None:
        """Forward and backward pass, without an optimizer."""
        model, ids = self.dense if arm == "dense" else self.sparse, self.ids[:, : self.prompt + ANSWER]
        labels = ids.clone()
        labels[:, : self.prompt] = -100
        model.train()
        self.call(arm, ids, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()

"""Architectures of other libraries in small, at random values: what people bring who have a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tests.benchmarks.torchvision_operators  # noqa: F401 - transformers imports torchvision, whose own may not load

N = 3
VOCABULARY, TIME = 50, 7


class Public(NamedTuple):
    """A module in float64 and eval mode, N examples, and their losses `(call, batch) -> (N,)`, where `call` is the
    module or its lifted form."""

    module: nn.Module
    batch: tuple[Tensor, ...]
    losses: Callable[[Callable, tuple], Tensor]


BUILDS: dict[str, Callable[[], tuple]] = {}


def add(build: Callable[[], tuple]) -> Callable[[], tuple]:
    BUILDS[build.__name__] = build
    return build


def public(name: str) -> Public:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, batch, losses = BUILDS[name]()
    batch = tuple(x.double() if x.is_floating_point() else x for x in batch)
    return Public(module.double().eval().requires_grad_(True), batch, losses)


def _ids(time: int = TIME) -> Tensor:
    return torch.randint(3, VOCABULARY, (N, time))


def _next_token(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def _decoder(module: nn.Module) -> tuple:
    return module, (_ids(),), lambda call, batch: _next_token(call(batch[0]).logits, batch[0])


def _encoder(module: nn.Module) -> tuple:
    mask = torch.ones(N, TIME, dtype=torch.int64)
    mask[0, 5:] = 0
    losses = lambda call, batch: call(batch[0], attention_mask=batch[1]).last_hidden_state.square().mean((1, 2))  # noqa: E731
    return module, (_ids(), mask), losses


def _pair(module: nn.Module) -> tuple:
    def losses(call, batch):
        return _next_token(call(input_ids=batch[0], decoder_input_ids=batch[1]).logits, batch[1])

    return module, (_ids(), _ids(5)), losses


def _classifier(module: nn.Module) -> tuple:
    def losses(call, batch):
        out: Any = call(batch[0])
        return F.cross_entropy(getattr(out, "logits", out), batch[1], reduction="none")

    return module, (torch.rand(N, 3, 32, 32), torch.randint(5, (N,))), losses


def _text(**widths) -> dict:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **sizes, **widths}


def _both_sides(**names) -> dict:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _SIDE.items()}
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return {"vocab_size": VOCABULARY, "d_model": 16, **layers, **tokens, **names}


_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
_PICTURE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_PICTURE |= {"image_size": 32, "patch_size": 8}


@add
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    cfg = GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=1, eos_token_id=2)
    return _decoder(GPT2LMHeadModel(cfg))


@add
def gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"max_position_embeddings": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4}
    kinds = [[["global", "local"], 1]]
    cfg = GPTNeoConfig(vocab_size=VOCABULARY, **sizes, attention_types=kinds, bos_token_id=1, eos_token_id=2)
    return _decoder(GPTNeoForCausalLM(cfg))


@add
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return _decoder(LlamaForCausalLM(LlamaConfig(**_text(num_key_value_heads=1))))


@add
def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return _decoder(MistralForCausalLM(MistralConfig(**_text(num_key_value_heads=1, sliding_window=4))))


@add
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    cfg = MixtralConfig(**_text(**experts))
    cfg._experts_implementation = "eager"  # the default one has no double precision
    return _decoder(MixtralForCausalLM(cfg))


@add
def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    cfg = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    return _decoder(MambaForCausalLM(cfg))


@add
def bert():
    from transformers import BertConfig, BertModel

    return _encoder(BertModel(BertConfig(**_text()), add_pooling_layer=False))


@add
def roberta():
    from transformers import RobertaConfig, RobertaModel

    return _encoder(RobertaModel(RobertaConfig(**_text()), add_pooling_layer=False))


@add
def albert():
    from transformers import AlbertConfig, AlbertModel

    return _encoder(AlbertModel(AlbertConfig(**_text(embedding_size=8)), add_pooling_layer=False))


@add
def distilbert():
    from transformers import DistilBertConfig, DistilBertModel

    sizes = {"max_position_embeddings": 32, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
    cfg = DistilBertConfig(vocab_size=VOCABULARY, **sizes)
    return _encoder(DistilBertModel(cfg))


@add
def electra():
    from transformers import ElectraConfig, ElectraModel

    return _encoder(ElectraModel(ElectraConfig(**_text(embedding_size=8))))


@add
def deberta_v2():
    from transformers import DebertaV2Config, DebertaV2Model

    places = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True}
    return _encoder(DebertaV2Model(DebertaV2Config(**_text(norm_rel_ebd="layer_norm", type_vocab_size=0), **places)))


@add
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return _pair(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)))


@add
def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    return _pair(BartForConditionalGeneration(BartConfig(**_both_sides(max_position_embeddings=32))))


@add
def marian():
    from transformers import MarianConfig, MarianMTModel

    return _pair(MarianMTModel(MarianConfig(**_both_sides(max_position_embeddings=32))))


@add
def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    names = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    cfg = WhisperConfig(**_both_sides(**names, suppress_tokens=None, begin_suppress_tokens=None))
    module, (_, ids), _ = _pair(WhisperForConditionalGeneration(cfg))

    def losses(call, batch):
        return _next_token(call(input_features=batch[0], decoder_input_ids=batch[1]).logits, batch[1])

    return module, (torch.rand(N, 8, 20), ids), losses


@add
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return _classifier(ViTForImageClassification(ViTConfig(**_PICTURE, num_labels=5)))


@add
def clip_vision():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    module = CLIPVisionModelWithProjection(CLIPVisionConfig(**_PICTURE, projection_dim=8))
    return module, (torch.rand(N, 3, 32, 32),), lambda call, batch: call(batch[0]).image_embeds.square().mean(1)


@add
def swin():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    cfg = SwinConfig(**sizes, drop_path_rate=0.0, num_labels=5)
    return _classifier(SwinForImageClassification(cfg))


@add
def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    cfg = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=5)
    return _classifier(ConvNextForImageClassification(cfg))


def _torchvision(name: str, *args, **options) -> None:
    def build():
        from torchvision import models

        return _classifier(getattr(models, name)(*args, num_classes=5, **options))

    BUILDS[f"torchvision's {name}"] = build


_torchvision("resnet18")
_torchvision("DenseNet", 8, (1, 1, 1, 1), 8)
_torchvision("efficientnet_b0", stochastic_depth_prob=0.0)
_torchvision("mobilenet_v3_small")
_torchvision("regnet_y_400mf")
_torchvision("VisionTransformer", 32, 8, 2, 2, 16, 24)
_torchvision("SwinTransformer", [4, 4], 8, [2, 2], [1, 2], [4, 4], stochastic_depth_prob=0.0)
_torchvision("MaxVit", (32, 32), 8, 4, [8, 8], [1, 1], 8, 0.0)


def _inception():
    from torchvision.models import inception_v3

    module, (_, labels), losses = _classifier(inception_v3(num_classes=5, aux_logits=False, init_weights=False))
    return module, (torch.rand(N, 3, 75, 75), labels), losses  # its smallest pictures


BUILDS["torchvision's inception_v3"] = _inception


def _timm(name: str, of: Callable[[Any], nn.Module]) -> None:
    def build():
        from timm import models

        return _classifier(of(models))

    BUILDS[f"timm's {name}"] = build


_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_classes": 5}
_timm("MlpMixer", lambda models: models.mlp_mixer.MlpMixer(num_blocks=2, **_SMALL))
_timm("ConvMixer", lambda models: models.convmixer.ConvMixer(8, 2, 5, 4, num_classes=5))
_timm("Beit", lambda models: models.beit.Beit(depth=2, num_heads=2, use_rel_pos_bias=True, **_SMALL))
_timm("MetaFormer", lambda models: models.metaformer.MetaFormer(depths=(1,) * 4, dims=(8,) * 4, num_classes=5))
_timm("NormFreeNet", lambda models: models.create_model("nf_regnet_b0", num_classes=5))
_timm("GhostNet", lambda models: models.create_model("ghostnet_050", num_classes=5))


@add
def unet_of_diffusers():
    from diffusers import UNet2DModel

    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    module = UNet2DModel(16, down_block_types=down, up_block_types=up, **sizes)
    losses = lambda call, batch: call(batch[0], batch[1]).sample.square().mean((1, 2, 3))  # noqa: E731
    return module, (torch.rand(N, 3, 16, 16), torch.randint(100, (N,))), losses


@add
def transformer_of_torch():
    module = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)
    losses = lambda call, batch: call(*batch).square().mean((1, 2))  # noqa: E731
    return module, (torch.rand(N, TIME, 16), torch.rand(N, 5, 16)), losses

"""Small networks of Hugging Face's transformers with random weights, and batches for them."""

import torch
import transformers
from torch import nn

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 5,
}
TEXT = {"vocab_size": 99, **SMALL}
IMAGE = {"image_size": 32, "patch_size": 8, **SMALL}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
MODERNBERT = {"pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
WAV2VEC2 = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
AST = {"max_length": 32, "num_mel_bins": 24, "frequency_stride": 8, "time_stride": 8}


def texts():
    """Return three texts of nine tokens, two of them padded."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 99, (3, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = mask[2, 4:] = 0
    return {"input_ids": tokens.where(mask > 0, 1), "attention_mask": mask}


def numbers(name, *shape):
    def batch():
        return {name: torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))}

    return batch


class ZeroShot(nn.Module):
    """CLIP with a matrix of class embeddings."""

    def __init__(self):
        super().__init__()
        sizes = {key: IMAGE[key] for key in IMAGE if key != "num_labels"}
        config = transformers.CLIPVisionConfig(projection_dim=16, **sizes)
        self.vision = transformers.CLIPVisionModelWithProjection(config)
        self.classes = nn.Parameter(torch.randn(5, 16))

    def forward(self, pixel_values):
        embedding = self.vision(pixel_values=pixel_values).image_embeds
        return 100 * (embedding / embedding.norm(dim=-1, keepdim=True)) @ self.classes.T


def classifier(kind, task, **config):
    def make():
        made = getattr(transformers, f"{kind}Config")(**config)
        return getattr(transformers, f"{kind}For{task}")(made)

    return make


PIXELS = numbers("pixel_values", 3, 32, 32)
CASES = {
    "BERT": (classifier("Bert", "SequenceClassification", **TEXT), texts),
    "DistilBERT": (
        classifier(
            "DistilBert", "SequenceClassification", vocab_size=99, num_labels=5, **DISTILBERT
        ),
        texts,
    ),
    "RoBERTa": (classifier("Roberta", "SequenceClassification", **TEXT), texts),
    "DeBERTa-v2": (classifier("DebertaV2", "SequenceClassification", **TEXT, **DEBERTA), texts),
    "ELECTRA": (classifier("Electra", "SequenceClassification", embedding_size=16, **TEXT), texts),
    "ModernBERT": (
        classifier("ModernBert", "SequenceClassification", eos_token_id=3, **TEXT, **MODERNBERT),
        texts,
    ),
    "ViT": (classifier("ViT", "ImageClassification", **IMAGE), PIXELS),
    "DeiT": (classifier("DeiT", "ImageClassification", **IMAGE), PIXELS),
    "DeiT, distilled": (classifier("DeiT", "ImageClassificationWithTeacher", **IMAGE), PIXELS),
    "Swin": (classifier("Swin", "ImageClassification", num_labels=5, **SWIN), PIXELS),
    "BEiT": (classifier("Beit", "ImageClassification", **IMAGE), PIXELS),
    "ConvNeXtV2": (
        classifier(
            "ConvNextV2",
            "ImageClassification",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
            num_labels=5,
        ),
        numbers("pixel_values", 3, 64, 64),
    ),
    "DINOv2": (classifier("Dinov2", "ImageClassification", mlp_ratio=2, **IMAGE), PIXELS),
    "CLIP, zero-shot": (ZeroShot, PIXELS),
    "Wav2Vec2": (
        classifier("Wav2Vec2", "SequenceClassification", **(TEXT | WAV2VEC2)),
        numbers("input_values", 1600),
    ),
    "AST": (
        classifier("AST", "AudioClassification", patch_size=8, **AST, **SMALL),
        numbers("input_values", 32, 24),
    ),
    "VideoMAE": (
        classifier("VideoMAE", "VideoClassification", num_frames=4, tubelet_size=2, **IMAGE),
        numbers("pixel_values", 4, 3, 32, 32),
    ),
}


def build(name):
    """Return a network of which no parameter is trivial, and a batch."""
    make, batch = CASES[name]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        elif parameter.std() < 0.03:  # transformers draw them so small that attention is uniform
            parameter *= 8
    return model, batch()

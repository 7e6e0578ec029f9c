"""Vision-language models that no adapter serves, and why."""

from __future__ import annotations

_ENCODER_DECODER = "an encoder reads picture and words together, and its decoder's sequence holds neither"
_CROSS_ATTENTION = "pictures enter through cross-attention, and its decoder's sequence holds no visual tokens"
_POSITION_MASK = "the place of the picture is given by a mask beside the prompt, not by placeholders in it"
_SHARED_KEYS = "later layers may reuse the keys of earlier ones, and every layer may read further inputs of each token"

# transformers' model_type -> reason, as the end of "this family cannot be served: ...".
UNSUPPORTED: dict[str, str] = {
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "blip": _CROSS_ATTENTION,
    "idefics": _CROSS_ATTENTION,
    "kosmos-2": _POSITION_MASK,
    "kosmos-2.5": _POSITION_MASK,
    "chameleon": "its decoder encodes pictures itself, as words of its vocabulary: nothing is known about them when a "
    "forward pass starts",
    "diffusion_gemma": "it denoises whole blocks of text instead of generating token by token",
    "emu3": "pictures become words of its vocabulary, with a line end per row, and no adapter lays them out",
    "evolla": "it reads proteins, not pictures",
    "fuyu": "it has no vision tower: the patches of a picture enter the decoder as they are",
    "gemma3n": _SHARED_KEYS,
    "gemma4": _SHARED_KEYS,
    "git": "its decoder puts the picture in front of the prompt itself, without placeholders",
    "granite4_vision": "windows of query tokens enter several decoder layers at once, and no adapter lays them out",
    "kimi_k25": "its decoder attends through latent keys, which have no heads to read or edit",
    "llama4": "its features are projected outside the feature function, and its layers attend in chunks of the cache",
    "pi0": "it generates the actions of a robot, not text",
    "shieldgemma2": "it classifies pictures and generates nothing; attach to the Gemma 3 inside it (model.model)",
}

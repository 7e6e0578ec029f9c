"""Parts of token pruning as pure functions on tensors: score, calibrate, select, merge, budget.

Tensors carry the tokens of one image on their last axis (scores ``[..., N]``) or the last but one (features
``[..., N, d]``); leading axes are images, tiles or samples, each handled by itself. Arithmetic that decides a ranking
is fp32 or wider; the earlier token wins a tie; whatever draws random numbers takes a seed. Selectors return ascending
int64 indices ``[..., k]``. Nothing in here knows a model or a token map.

:mod:`~vlm_attn.kit.scores`, :mod:`~vlm_attn.kit.calibrators`, :mod:`~vlm_attn.kit.selectors`,
:mod:`~vlm_attn.kit.mergers`, :mod:`~vlm_attn.kit.budgets`
"""

"""How much of an objective on representations is position instead of content.

Six diagnostics, five of a teacher and one of two objectives:

1. :func:`shift_curve`: what moving the same content costs.
2. :func:`content_free_similarity`: how similar frames of different utterances are at equal
   positions, compared with unequal ones.
3. :func:`position_probe`: how well a linear map reads the position from a frame.
4. :func:`objective_share`: which share of what an objective can win is position.
5. :class:`MismatchedTargets`: training without content, to see what an objective wins all the same.
6. :func:`gradient_agreement`: whether two objectives pull an enhancer the same way.
"""

from pi_finetune.diagnostics.causal import (
    TARGETS,
    MismatchedTargets,
    falls_of_matched,
    held_out_losses,
)
from pi_finetune.diagnostics.gradients import batch_gradients, gradient_agreement
from pi_finetune.diagnostics.probe import position_probe, ridge_probe
from pi_finetune.diagnostics.share import (
    moved_values,
    objective_share,
    representation_objective,
    share_of_fall,
    training_scores,
)
from pi_finetune.diagnostics.shift import SHIFTS, shift_curve, unrelated_distance
from pi_finetune.diagnostics.similarity import content_free_similarity, similarity_by_offset
from pi_finetune.diagnostics.views import (
    MIN_UTTERANCES,
    AllLayers,
    Crops,
    EachLayer,
    Offset,
    chosen_layers,
    load_crops,
)

__all__ = [
    "MIN_UTTERANCES",
    "SHIFTS",
    "TARGETS",
    "AllLayers",
    "Crops",
    "EachLayer",
    "MismatchedTargets",
    "Offset",
    "batch_gradients",
    "chosen_layers",
    "content_free_similarity",
    "falls_of_matched",
    "gradient_agreement",
    "held_out_losses",
    "load_crops",
    "moved_values",
    "objective_share",
    "position_probe",
    "representation_objective",
    "ridge_probe",
    "share_of_fall",
    "shift_curve",
    "similarity_by_offset",
    "training_scores",
    "unrelated_distance",
]

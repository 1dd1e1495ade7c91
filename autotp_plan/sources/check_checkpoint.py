"""Whether a checkpoint is the one that a plan was compiled for."""

from __future__ import annotations

from autotp_plan.schemas.errors import Fault
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.plan_fit import checkpoint_faults
from autotp_plan.sources.model_folder import Place, open_checkpoint


def check_checkpoint(plan: Plan, checkpoint: Place) -> list[Fault]:
    """Check that a checkpoint is the one a plan was compiled for.

    Args:
        plan: the plan.
        checkpoint: a folder with safetensors files, and an index when there are several.

    Returns:
        What differs: tensors missing, of another shape or dtype, or too many; config.json. Empty when the plan fits.

    Raises:
        CheckpointError: the checkpoint cannot be read at all.
    """
    return checkpoint_faults(plan, open_checkpoint(checkpoint, plan.dequantized_dtype))

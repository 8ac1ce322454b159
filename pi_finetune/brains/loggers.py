"""Training loggers that SpeechBrain lacks."""

from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.train_logger import TensorboardLogger


class UpdateTensorboardLogger(TensorboardLogger):
    """TensorBoard with the update as its axis.

    SpeechBrain's own logger counts calls and starts again from 1 after a resume.

    Arguments
    ---------
    save_dir : str
    """

    @main_process_only
    def log_stats(self, stats_meta, train_stats=None, valid_stats=None, test_stats=None, verbose=0):
        """Write every number under its name and part, at step ``stats_meta["update"]``."""
        if "update" not in stats_meta:
            return
        parts = (("meta", stats_meta), ("train", train_stats), ("valid", valid_stats))
        for part, stats in parts:
            for name, value in (stats or {}).items():
                self.writer.add_scalar(f"{part}/{name}", value, stats_meta["update"])
        self.writer.flush()

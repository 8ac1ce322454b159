"""Average the weights of enhancers that were fine-tuned from the same model.

    python tools/average_enhancers.py results/one/enhance/1234 results/two/enhance/1234 \
        --output_folder averaged

The average often has what is good in each (Wortsman et al., "Model soups", ICML 2022), at the cost
of one. Only models that have a start in common can be averaged; whether it helps, a score on dev
must say. With ``--half`` the weights are stored in half precision; of one model it is a copy.
"""

import argparse
import sys
from pathlib import Path

from speechbrain.utils.checkpoints import average_state_dicts

from pi_finetune.enhancers import load_enhancer, save_enhancer
from pi_finetune.errors import UserError, command


@command
def main(argv=None):
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("enhancers", nargs="+", help="run folders, or others with an enhancer.yaml")
    parser.add_argument("--output_folder", required=True, help="a new folder")
    parser.add_argument("--half", action="store_true", help="store half precision")
    args = parser.parse_args(argv)

    if Path(args.output_folder).exists():
        raise UserError(f"--output_folder: {args.output_folder} exists; name a new folder.")
    models = [load_enhancer(folder) for folder in args.enhancers]
    enhancer = models[0]
    for folder, model in zip(args.enhancers, models, strict=True):
        if model.config != enhancer.config:
            raise UserError(
                f"{folder}: its enhancer.yaml says {model.config}, that of {args.enhancers[0]} "
                f"{enhancer.config}; only equal models can be averaged."
            )
    enhancer.load_state_dict(average_state_dicts(model.state_dict() for model in models))
    save_enhancer(args.output_folder, enhancer.half() if args.half else enhancer)
    print(f"{args.output_folder}: the average of {len(models)}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every parameter of the project: its default, bounds and help, the presets, and a checked Config."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from typing import Any

from attribution.errors import InputError

FOOD_CLASSES = (
    "bruschetta,garlic_bread,grilled_salmon,omelette,pancakes,"
    "pizza,pork_chop,spaghetti_bolognese,spaghetti_carbonara,steak"
)

BOUNDS = {"at_least": ge, "at_most": le, "above": gt, "below": lt}  # of option

UNITS = {"s": 1, "min": 60, "m": 60, "": 60, "h": 3600}  # of time_budget

SCRATCH_MODELS = ("resnet-mini",)  # trained from random weights

# With preset images a command chooses these from the data and the model
# (attribution/cli/auto_settings.py). The values in PRESETS serve callers that look at no data.
AUTO = (
    "image_size", "augment", "batch_size", "epochs",
    "learning_rate", "weight_decay", "num_models", "num_seeds",
)  # fmt: skip

# Each parameter's value with preset digits, food101 and images.
_BY_PRESET: dict[str, tuple[Any, Any, Any]] = {
    "dataset": ("digits", "ethz/food101", None),
    "classes": ("", FOOD_CLASSES, ""),
    "image_size": (16, 224, 64),
    "label_noise": (0.1, 0.0, 0.0),
    "augment": ("none", "flip,crop", "flip,crop"),
    "model": ("resnet-mini", "microsoft/resnet-18", "auto"),
    "train_layers": ("all", "all", "auto"),
    "num_models": (10, 4, 4),
    "epochs": (15, 20, 15),
    "learning_rate": (2e-3, 1e-4, 3e-3),
    "batch_size": (32, 64, 64),
    "weight_decay": (5e-4, 0.01, 5e-4),
    "patience": (0, 3, 0),
    "precision": ("float32", "auto", "auto"),
    "feature_precision": ("float32", "auto", "auto"),
    "proj_dim": (256, 512, 256),
    "num_seeds": (10, 10, 10),
    "num_subsets": (100, 50, 50),
    "num_repeats": (3, 2, 2),
    "brittleness_targets": (30, 0, 0),
}
PRESETS: dict[str, dict[str, Any]] = {
    preset: {k: v[i] for k, v in _BY_PRESET.items() if v[i] is not None}
    for i, preset in enumerate(("digits", "food101", "images"))
}


def _default_cache_dir() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("TRAK_ABLATION_CACHE") or os.path.join(base, "trak-ablation")


def option(group: str, help: str, default: Any = None, **bounds: Any) -> Any:
    """A documented parameter; `bounds` may hold choices, at_least, at_most, above and below."""
    return field(default=default, metadata={"group": group, "help": help, **bounds})


@dataclass(frozen=True)
class Config:
    """All parameters of a command. None means that the preset decides."""

    # fmt: off
    preset: str = option("data", "a set of defaults; auto is images if a dataset is named, otherwise digits", "auto", choices=("auto", *PRESETS))
    dataset: str = option("data", "digits, a Hub id, or a folder of images in class subfolders")
    classes: str = option("data", "comma list of the class names to use (in double quotes if a name contains a comma); empty uses all")
    image_size: int = option("data", "side in pixels to which every image is resized and cropped", at_least=1, at_most=4096)
    label_noise: float = option("data", "share of training labels that are flipped on purpose and recorded", at_least=0, below=1)
    noise_kind: str = option("data", "flips go to any other class (uniform), or to the next class in the list (pair)", "uniform", choices=("uniform", "pair"))
    shortcut: str = option("data", "patch paints a coloured square on 95 % of the training images of the first class, on 5 % of the others, and on half of all validation and test images", "none", choices=("none", "patch"))
    keep: str = option("data", "file that names the images to keep: a list of example_ids of training images, or a table from suspects.html or export_arm; empty keeps all", "")
    labels: str = option("data", "table with the columns example_id (or file_name) and label: labels to use in place of the data set's; empty changes none", "")
    data_seed: int = option("data", "seed of the splits and of the planted label noise", 0, at_least=0)
    split_by: str = option("data", "keep the images of one patient, product or video in one split: a column of the data set, or a pattern in file names whose first group says which, such as '(patient\\d+)_'; empty keeps only copies of an image together", "")
    val_fraction: float = option("data", "share of the images to divide that become the validation split; not used if the data set has a validation part", 0.2, above=0, below=1)
    test_fraction: float = option("data", "share of the images to divide that become the test split; not used if the data set has a test part", 0.2, above=0, below=1)
    resplit: str = option("data", "whether the data set's own validation and test parts are ignored and all its labelled images divided; the flag alone means yes", "no", choices=("no", "yes"))
    image_column: str = option("data", "column of a table or Hub data set that names or holds the images; empty finds it", "")
    label_column: str = option("data", "column of a table or Hub data set that holds the labels; empty finds it", "")
    class_depth: int = option("data", "level of the class folders below the data set or its parts; 0 takes the deepest folders that hold images, -1 takes those of one name as one class", 0, at_least=-1)
    small_classes: str = option("data", "what to do with classes that have too few images to divide: leave_out, or stop", "leave_out", choices=("leave_out", "stop"))
    on_bad_image: str = option("data", "what to do with a file that cannot be decoded: stop, or skip and count it", "stop", choices=("stop", "skip"))
    augment: str = option("training", "train-time augmentation", choices=("none", "flip", "crop", "flip,crop"))
    model: str = option("training", "a Hub id, a from_pretrained folder, or resnet-mini (small, trained from scratch); auto is microsoft/resnet-18 from the Hub or its cache, and resnet-mini where it cannot be had within seconds")
    train_layers: str = option("training", "layers that are trained and scored: the head, also the last stage, or all; others stay as they were pretrained. auto is all with a GPU or from scratch", choices=("auto", "head", "last", "all"))
    epochs: int = option("training", "most passes over the training set", at_least=1)
    learning_rate: float = option("training", "highest learning rate of the schedule", above=0)
    batch_size: int = option("training", "images per training step", at_least=2)
    weight_decay: float = option("training", "AdamW's decoupled weight decay", at_least=0)
    schedule: str = option("training", "course of the learning rate", "one_cycle", choices=("one_cycle", "cosine"))
    patience: int = option("training", "stop after this many epochs without a better validation loss; 0 never stops early", at_least=0)
    precision: str = option("training", "precision of training; auto is bfloat16 autocast if the hardware supports it", choices=("auto", "float32", "bfloat16"))
    num_models: int = option("finetune", "models that are trained independently; each leaves one checkpoint, or those of checkpoint_epochs", at_least=1)
    checkpoint_epochs: str = option("finetune", "epochs after which each model leaves a checkpoint: a comma list of numbers from 1, or last:3 for the last 3 that are run, also where patience would keep an earlier one; empty leaves the final weights", "")
    subset_fraction: float = option("finetune", "share of the training set that each model sees, drawn separately for each", 0.5, above=0, at_most=1)
    checkpoints: str = option("finetune", "comma list of folders with your own trained models, in place of training: save_pretrained folders (safetensors), or folders of them such as a Trainer's output", "")
    seed: int = option("training", "root of every seed except data_seed", 0, at_least=0)
    finetune_run_id: str = option("lineage", "id of the finetune run whose checkpoints are scored; empty finds or makes one", "")
    proj_dim: int = option("trak", "length of the projected gradient of each block", at_least=1)
    num_blocks: int = option("trak", "blocks of consecutive layers; each block has its own projection and Gram matrix. 1 is TRAK as published, and the only choice with projector=normal", 10, at_least=1)
    projector: str = option("trak", "sketch is ours; normal is traker's own gradients and dense Gaussian projection", "sketch", choices=("sketch", "normal"))
    feature_precision: str = option("trak", "precision of the forward and backward pass for gradients; auto as for precision", choices=("auto", "float32", "bfloat16"))
    lambda_reg: float = option("trak", "ridge, in units of the mean eigenvalue of the Gram matrix of the features", 0.1, at_least=0)
    loss_gradient_weight: str = option("trak", "mean multiplies row i of the scores by the mean of 1 - p over checkpoints; none does not", "mean", choices=("mean", "none"))
    keep_features: str = option("trak", "keep the features, which explain needs for new pictures (num_models x n_train x num_blocks x proj_dim x 2 bytes); auto keeps up to 2 GiB", "auto", choices=("auto", "yes", "no"))
    cross_fit: str = option("trak", "examine every image for suspects by models trained on four fifths of all images without it (15 trainings); auto does so where the head alone is trained, but not with checkpoints", "auto", choices=("auto", "yes", "no"))
    replay: str = option("lineage", "id of a run to compute again with nothing reused; says whether the results are identical", "")
    trak_run_id: str = option("lineage", "id of the trak run whose scores are used; empty finds or makes one", "")
    frac: str = option("ablation", "share of the training set to remove: one value or a comma list", "0.05")
    arms: str = option("ablation", "comma list of removal strategies (README.md explains them)", "none,random,helpful,harmful,negative,loss")
    action: str = option("ablation", "what happens to the examples that an arm chooses: remove them, relabel them as the ensemble predicts, or both, one after the other", "remove", choices=("remove", "relabel", "both"))
    metric: str = option("ablation", "test metric that differences, p-values and verdicts are of; auto is accuracy, or balanced_accuracy where the largest class has more than 3 times the training images of the smallest", "auto", choices=("auto", "accuracy", "balanced_accuracy", "macro_f1", "worst_class"))
    num_seeds: int = option("ablation", "paired retrainings of each arm", at_least=2)
    contrasts: str = option("ablation", "comma list of pairs of compared arms, such as harmful-loss, whose paired difference is judged too; empty is harmful-loss where both are compared", "")
    count: str = option("design", "number of training examples to remove, in place of frac: one value or a comma list", "")
    num_splits: int = option("design", "repeat the whole experiment on so many splits of the data, from data_seed on, and compare with the split as the unit", 1, at_least=1)
    groups: str = option("ablation", "groups of targets: label, a column of the data set (group with shortcut=patch), auto (splits each label in two by its scores), or auto_uncentred (as the authors' code of D3M splits)", "label")
    group_weights: str = option("ablation", "weight of each group in the alignment", "exp_loss", choices=("exp_loss", "loss", "uniform", "paper"))
    num_subsets: int = option("evaluate", "random subsets of the training set that models are retrained on", at_least=10)
    num_repeats: int = option("evaluate", "models per subset; a noise ceiling needs at least 2", at_least=1)
    alpha: float = option("evaluate", "share of the training set in each subset", 0.5, above=0, below=1)
    bank: str = option("evaluate", "retrained models of an earlier evaluate run to use again: a folder, or runs:/RUN_ID/bank", "")
    methods: str = option("evaluate", "comma list of the methods to judge; ekfac needs kronfluence (pip install -e '.[benchmark]')", "trak,trak_unweighted,trak_weighted,gradient_dot,gradient_cosine,penultimate,loss,confident,self_influence,random")
    brittleness_targets: int = option("evaluate", "single targets whose most helpful examples are removed; 0 skips this part", at_least=0)
    brittleness_k: int = option("evaluate", "examples that are removed for each of those targets", 20, at_least=1)
    target: str = option("explain", "comma list of targets (numbers of validation examples)", "")
    image: str = option("explain", "image file whose prediction is explained; needs a trak run with features", "")
    label: str = option("explain", "class whose margin is explained for that image; empty takes the predicted class", "")
    errors: int = option("explain", "explain this many of the most confident mistakes; 0 means 6 if neither target nor image is given", 0, at_least=0)
    exact: str = option("explain", "explain one model, the best checkpoint, by the exact derivative of its margins through its own training, and train it again to check; needs train_layers=head; the flag alone means yes", "no", choices=("no", "yes"))
    num_examples: int = option("explain", "how many helpful and how many harmful examples are shown", 6, at_least=1)
    export_arm: str = option("export", "arm whose kept training examples are written to a file per frac, for keep", "")
    export: str = option("corrected data", "folder to write the data set to, as keep and labels leave it", "")
    export_format: str = option("corrected data", "folder: class folders in train, validation and test; hf: a data set for load_from_disk; csv: a table of the images' paths, labels and label issues, which the others hold too", "folder", choices=("folder", "hf", "csv"))
    output: str = option("output", "folder to save the report or the explanations in; exported arms go to cleaned if it is empty", "")
    overwrite: str = option("files", "whether existing files, or an earlier export, may be replaced; the flag alone means yes", "no", choices=("no", "yes"))
    quality: str = option("execution", "best takes three times as many models and (except for a head alone) twice the proj_dim, where they are left open: scores that predict retraining better, for more time", "default", choices=("default", "best"))
    time_budget: str = option("execution", "longest time for the command, such as 90s, 10min or 2h (a plain number is minutes): it lowers num_models and num_seeds, where they are left open, until the plan fits", "")
    keep_checkpoints: str = option("execution", "checkpoints to keep in MLflow once the command has ended: all, the best on validation, or none. Applies to checkpoints that this command has made", "all", choices=("all", "best", "none"))
    device: str = option("execution", "auto, cpu, or cuda", "auto")
    cuda_graphs: str = option("execution", "on a GPU, keep the training images in its memory and replay training steps as CUDA graphs; the first replay is compared with a plain step", "on", choices=("on", "off"))
    jobs: int = option("execution", "tasks at the same time; 0 is one per core, one on a GPU, and with ray as many as the cluster has room for", 0, at_least=0)
    backend: str = option("execution", "where tasks run: processes on this machine, or a Ray cluster (pip install -e '.[ray]')", "local", choices=("local", "ray"))
    ray_address: str = option("execution", "host:port of a running Ray cluster, or auto; empty takes RAY_ADDRESS, or starts a cluster on this machine", "")
    gpus_per_task: float = option("execution", "GPUs per task with backend=ray and device=cuda; 0.25 puts four tasks on a GPU", 1.0, at_least=0)
    gpu_kernels: str = option("execution", "on a GPU, compute features with this project's Triton kernels if a comparison on two images passes; off uses PyTorch's operations alone", "on", choices=("on", "off"))
    cache_dir: str = field(default_factory=_default_cache_dir, metadata={"group": "execution", "help": "folder for decoded images and unfinished work"})
    # fmt: on

    @property
    def fracs(self) -> list[float]:
        return [_share(part, self.frac) for part in self.frac.split(",")]

    @property
    def counts(self) -> list[int]:
        return _whole_numbers("count", self.count)

    @property
    def arm_names(self) -> list[str]:
        return split_list(self.arms)

    @property
    def method_names(self) -> list[str]:
        return split_list(self.methods)

    @property
    def target_numbers(self) -> list[int]:
        return _whole_numbers("target", self.target)

    @property
    def epoch_numbers(self) -> list[int]:
        """`checkpoint_epochs` in ascending order; those of last:K from -K to -1, as list indices."""
        if last := re.fullmatch(r"last:(\d{1,6})", self.checkpoint_epochs.strip()):
            numbers = list(range(-int(last[1]), 0))
        else:
            numbers = sorted(set(_whole_numbers("checkpoint_epochs", self.checkpoint_epochs)))
        if self.checkpoint_epochs and not (numbers and (last or numbers[0] > 0)):
            raise InputError(
                f"checkpoint_epochs={self.checkpoint_epochs}: name epochs from 1, such as 5,10, or the "
                "last ones, such as last:3"
            )
        return numbers

    @property
    def checkpoints_per_run(self) -> int:
        return len(self.epoch_numbers) or 1

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints in the ensemble, ordered by run and within a run by epoch."""
        return self.num_models * self.checkpoints_per_run

    @property
    def given_folders(self) -> list[str]:
        return split_list(self.checkpoints)

    @property
    def has_no_start(self) -> bool:
        """Whether the only models known are already trained on the data."""
        return self.model in self.given_folders

    @property
    def budget_seconds(self) -> float:
        """`time_budget` in seconds, infinite without one."""
        if not self.time_budget:
            return math.inf
        found = re.fullmatch(r"(\d+\.?\d*) *(s|min|m|h|)", self.time_budget.strip().lower())
        seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
        if not seconds:
            raise InputError(f"time_budget={self.time_budget}: not a time such as 90s, 10min or 2h")
        return seconds

    @property
    def wanted_classes(self) -> list[str]:
        return split_list(self.classes)

    def group(self, *names: str) -> dict[str, Any]:
        """The parameters of these groups, as a plain dictionary in order of declaration."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["group"] in names
        }


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def check_device(name: str) -> None:
    """Refuse a device of another name, without asking whether it is there.

    Raises:
        InputError: it is none of auto, cpu, cuda and cuda:NUMBER.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"device={name}: must be auto, cpu, or cuda (cuda:1 is the second GPU)")


def split_list(text: str) -> list[str]:
    """Split a comma list: 'a, b' is ['a', 'b'], '"a, b"' is ['a, b'], an empty text no items."""
    items = re.finditer(r'\s*"([^"]*)"\s*(?=,|\Z)|[^,]+', text)
    return [item for each in items if (item := (each[1] or each[0]).strip())]


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in split_list(text)]
    except ValueError:
        raise InputError(f"{name}={text}: not a comma list of whole numbers") from None


def _share(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise InputError(f"frac={text}: {part!r} is not a number between 0 and 1, both excluded")
    return value


def nearest(name: str, valid: Sequence[str], limit: int = 5) -> str:
    """The valid names closest to a mistyped one, as the end of an error message."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.5)
    names = close or list(valid)[:limit]
    more = "" if close or len(valid) <= limit else f", … ({len(valid)} in total)"
    return ("did you mean " if close else "valid: ") + ", ".join(map(str, names)) + more


def convert(name: str, text: str) -> Any:
    """Convert the text of a flag to the type of its parameter.

    Raises:
        InputError: the text is not a number where one is needed.
    """
    kind = str(FIELDS[name].type)
    try:
        return {"int": int, "float": float, "str": str}[kind](text)
    except ValueError:
        kinds = {"int": "a whole number", "float": "a number"}
        raise InputError(f"{name}={text}: not {kinds[kind]}") from None


def resolve(given: dict[str, Any], inherited: dict[str, Any] | None = None) -> Config:
    """Fill in the parameters that the caller left out, then check every value.

    Args:
        given: values that the caller gave, by name.
        inherited: values of a run that is built on. They win over the preset; a given value that
            contradicts one is refused, since the run was made with the other value.

    Raises:
        InputError: an unknown preset, a value out of bounds, or a contradiction.
    """
    for name, value in (inherited or {}).items():
        if name != "preset" and name in given and given[name] != value:
            raise InputError(
                f"{name}={given[name]}: the run built on was made with {name}={value}; "
                "leave it out, or name another run"
            )
    values = {**given, **(inherited or {})}
    values["preset"] = _preset(given.get("preset", "auto"), values)
    preset = values["preset"]
    values = {**PRESETS[preset], **{k: v for k, v in values.items() if v is not None}}
    if not values.get("dataset"):
        raise InputError(f"dataset: preset={preset} needs one: a Hub id or a folder of images")
    values["cache_dir"] = values.get("cache_dir") or _default_cache_dir()
    values |= {k: os.path.expanduser(values.get(k) or "") for k in ("cache_dir", "model", "bank")}
    config = Config(**values)
    for f in FIELDS.values():
        _check(f, getattr(config, f.name))
    if config.val_fraction + config.test_fraction >= 1:
        raise InputError(
            f"val_fraction={config.val_fraction}: leaves nothing to train on with test_fraction="
            f"{config.test_fraction}; their sum must be below 1"
        )
    _ = config.fracs, config.counts, config.target_numbers
    _ = config.epoch_numbers, config.budget_seconds
    return config


def _preset(asked: str, values: dict[str, Any]) -> str:
    _check(FIELDS["preset"], asked)
    names = (asked, values.get("preset", "auto"))
    by_data = "digits" if values.get("dataset") in (None, "", "digits") else "images"
    return next((name for name in names if name != "auto"), by_data)


def _check(f: dataclasses.Field, value: Any) -> None:
    rules, shown = f.metadata, f"{f.name}={value}"
    if "choices" in rules and value not in rules["choices"]:
        raise InputError(f"{shown}: {nearest(str(value), rules['choices'], limit=10)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{shown}: must be a finite number")
    for bound, holds in BOUNDS.items():
        if bound in rules and not holds(value, rules[bound]):
            raise InputError(f"{shown}: must be {bound.replace('_', ' ')} {rules[bound]}")

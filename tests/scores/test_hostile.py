"""Hostile files through the commands: one line, exit code 2, a FAILED run; and pages that run nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Place, Result, check_refusal, refused, run_id, write_images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(new_place: Callable[..., Place]) -> Place:
    """A store with one finished finetune run and one finished trak run."""
    place = new_place("hostile")
    place.done("trak")
    return place


# -- what a command is given -----------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    from attribution.models import classifier

    half = (0.5, 0.5, 0.5)
    model = classifier.build("resnet-mini", ("a", "b"), 0)
    classifier.save(model, folder, 16, half, half)
    return folder


def with_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def pickled(folder: Path) -> Path:
    """Weights as a pickle that leaves a mark when it is read."""
    (folder / "model.safetensors").unlink()
    mark = str(folder / "executed").encode()
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nopen\n(V%s\nVw\ntR." % mark)
    return folder


def remote(folder: Path) -> Path:
    """A model whose class is code beside it."""
    (folder / "evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nclass C: pass\n")
    maps = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.C"}
    return with_config(folder, auto_map=maps, model_type="new")


def not_finite(folder: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["resnet.embedder.embedder.convolution.weight"][:] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (pickled, "no file named model.safetensors"),
        (remote, "custom code"),
        (not_finite, "is not finite"),
        (lambda folder: with_config(folder, hidden_sizes=[10**6] * 3), "describes"),
    ],
    ids=["a pickle", "remote code", "NaN", "terabytes"],
)
def test_a_hostile_model(place: Place, tmp_path: Path, spoil, says: str) -> None:
    folder = spoil(model_folder(tmp_path / "model"))
    refused(place, "finetune", f"model={folder}", says, model=folder)
    assert not (folder / "executed").exists()


def test_a_hostile_folder_of_images(place: Place, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=5)
    loop, bomb = folder / "red" / "loop.png", folder / "red" / "bomb.png"
    loop.symlink_to(loop)
    refused(place, "finetune", f"dataset={folder}", "leads nowhere", dataset=folder)
    loop.unlink()
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\1\0\0" * 2 + b"\x08\x02\0\0\0"
    bomb.write_bytes(header)
    refused(place, "finetune", f"dataset={folder}", "red/bomb.png", "decoded", dataset=folder)


@pytest.mark.parametrize("damage", ["not finite", "object", "claims"])
def test_hostile_scores(place: Place, new_place: Callable[..., Place], damage: str) -> None:
    """With a hash that fits: whoever changed them could change that too."""
    copy = new_place("scores", like=place)
    folder = copy.artifacts(run_id(copy, "trak")) / "scores"
    file, values = folder / "scores.npy", np.load(folder / "scores.npy")
    if damage == "claims":
        content = file.read_bytes()
        shape = str(values.shape).encode()
        file.write_bytes(content.replace(shape, b"(%d, 9)" % 10**9).replace(b" " * 9, b"", 1))
    else:
        other = np.full_like(values, np.nan) if damage == "not finite" else values.astype(object)
        np.save(file, other, allow_pickle=True)
    document = json.loads((folder / "metadata.json").read_text())
    document["sha256"] = sha256(file.read_bytes()).hexdigest()
    (folder / "metadata.json").write_text(json.dumps(document))
    for stage in ("ablation", "explain"):
        check_refusal(failed(copy, stage), "scores=", "scores.npy")


def failed(place: Place, stage: str, **given: Any) -> Result:
    result = place.run(stage, **given)
    assert result.code == 2
    assert result.runs[0].info.status == "FAILED" and not result.made()
    return result


@pytest.mark.parametrize(
    "spoil", [lambda f: f.write_bytes(b"PK"), lambda f: np.savez(f, masks=[1])]
)
def test_hostile_logits(place: Place, new_place: Callable[..., Place], spoil) -> None:
    copy = new_place("logits", like=place)
    spoil(copy.artifacts(run_id(copy, "finetune")) / "training" / "logits.npz")
    check_refusal(failed(copy, "explain", errors=1), "logits=", "cannot be read")


def test_a_hostile_checkpoint(place: Place, new_place: Callable[..., Place]) -> None:
    copy = new_place("checkpoint", like=place)
    not_finite(copy.artifacts(run_id(copy, "finetune")) / "checkpoints" / "001")
    check_refusal(failed(copy, "trak", proj_dim=16), "checkpoints/001", "is not finite")


# -- pages in a browser ----------------------------------------------------------------------------

# Each would say so in `window.owned`, or ask for a file, were it not escaped.
CLASSES = (
    "<script>window.owned = 1</script>",
    "'\"><img src=x onerror='window.owned = 2'>",
    "</td></title></style><svg onload=window.owned=3>",
)
FILE = "\"><img src=x onerror='window.owned = 4'>\n.png"


@pytest.fixture(scope="module")
def pages(new_place: Callable[..., Place], tmp_path_factory) -> list[Path]:
    """report.html and explanation.html of data whose classes and files have such names."""
    import datasets

    root = tmp_path_factory.mktemp("names")
    files = sorted(write_images(root / "images", per_class=8).glob("*/*.png"))
    images = [{"bytes": f.read_bytes(), "path": f"{i}{FILE}"} for i, f in enumerate(files)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
    )
    columns = {"image": images, "label": [i // 8 for i in range(24)]}
    (root / "hub").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(root / "hub" / "train.parquet")
    place = new_place("pages")
    given = {"dataset": root / "hub", "epochs": 1, "label_noise": 0.2}
    report = place.done("ablation", **given, arms="harmful,loss").run_id
    explained = place.done("explain", **given, target="0,1,2").run_id
    return [
        place.artifacts(report) / "report.html",
        place.artifacts(explained) / "explanation.html",
    ]


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path], tuple[Any, list[str]]]]:
    """Opens a page; what it asks for beside itself, and what its console says, is noted."""
    context = browser.new_context()

    def open_page(file: Path) -> tuple[Any, list[str]]:
        page, heard = context.new_page(), []
        own = file.as_uri()
        page.on("request", lambda r: r.url.startswith((own, "data:")) or heard.append(r.url))
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        page.goto(own)
        page.wait_for_load_state("networkidle")
        return page, heard

    yield open_page
    context.close()


@pytest.mark.parametrize("number", [0, 1], ids=["report", "explanation"])
def test_names_in_data_run_nothing_in_a_browser(pages, opened, number: int) -> None:
    page, heard = opened(pages[number])
    assert page.evaluate("window.owned") is None
    assert not heard
    assert page.locator("script, iframe, img[src=x], svg[onload]").count() == 0
    text = page.locator("body").inner_text()
    assert all(name in text for name in CLASSES)
    titles = page.locator("figure[title]").evaluate_all("all => all.map(each => each.title)")
    assert titles and all(title.endswith(FILE) for title in titles)
    broken = "all => all.filter(each => !each.naturalWidth).length"
    assert page.locator("img").count() > 2
    assert page.locator("img").evaluate_all(broken) == 0


@pytest.mark.parametrize("number", [0, 1], ids=["report", "explanation"])
def test_were_a_name_not_escaped_the_page_would_still_run_nothing(
    pages, opened, tmp_path: Path, number: int
) -> None:
    """The second lock; and the test above can fail."""
    html = pages[number].read_text(encoding="utf-8")
    policy = html[html.index("<meta http-equiv") :].split("\n")[0]
    for lock, expected in ((policy, None), ("", 1)):
        file = tmp_path / "page.html"
        file.write_text(html.replace(policy, lock).replace("<body>", f"<body>{CLASSES[0]}"))
        page, _ = opened(file)
        assert page.evaluate("window.owned") == expected

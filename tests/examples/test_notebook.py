"""The notebook runs from its first cell to its last, by Jupyter's kernel."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers import fresh_environment
from tests.installed import run

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
QUICK = "EPOCHS = 2"
CURVES = [
    "gradients at every step",
    "local SGD, H = 8",
    "gossip",
    "gossip, one bit a value",
    "gossip of eight replicas on a ring, simulated",
]

EXECUTE = textwrap.dedent(
    """
    import sys, nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(sys.argv[1], as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    nbformat.write(notebook, sys.argv[1])
    """
)


def cells() -> list[dict[str, object]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def check(curves: dict[str, list[tuple[int, float]]]) -> None:
    assert list(curves) == CURVES
    for curve in curves.values():
        assert len(curve) == 2
        assert curve[0][0] < curve[1][0]
        assert curve[1][1] > 0.8
    sent = {name: curve[-1][0] for name, curve in curves.items()}
    steps = 2 * 45  # 1,437 images in batches of 16 for two replicas, two epochs
    assert sent["gradients at every step"] / sent["local SGD, H = 8"] == pytest.approx(steps / (steps // 8), rel=0.01)


def test_it_is_clean() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids)) > 10
    (parameters,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert parameters["source"][0].startswith("EPOCHS = ")


def test_its_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.launch
def test_it_runs_in_jupyter(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    (at,) = [k for k, cell in enumerate(notebook["cells"]) if cell["metadata"].get("tags") == ["parameters"]]
    quick = {"cell_type": "code", "execution_count": None, "id": "quick", "metadata": {}, "outputs": [], "source": QUICK}
    last = {**quick, "id": "last", "source": "import json\nprint(json.dumps(curves))"}
    notebook["cells"] = [*notebook["cells"][: at + 1], quick, *notebook["cells"][at + 1 :], last]
    (tmp_path / "notebook.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, "-c", EXECUTE, "notebook.ipynb"]
    run(command, tmp_path, fresh_environment(ROOT), timeout=240)
    executed = json.loads((tmp_path / "notebook.ipynb").read_text())["cells"]
    check(json.loads("".join(executed[-1]["outputs"][0]["text"])))
    pictures = [output for cell in executed for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2

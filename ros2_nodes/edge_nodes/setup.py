"""colcon's build of edge_nodes. edge_runtime itself comes from pip, see the project's README."""

from glob import glob
from pathlib import Path

from setuptools import setup

NAME = "edge_nodes"
# The planner that ships with the project; absent where this package was copied out of it
PLANNER = "../../examples/planner"

data_files = [
    ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
    (f"share/{NAME}", ["package.xml"]),
    (f"share/{NAME}/launch", sorted(glob("launch/*.launch.py"))),
    (f"share/{NAME}/config", sorted(glob("config/*.yaml"))),
]
for part in ("", "model", "draft"):
    files = sorted(glob(f"{PLANNER}/{part}/*.json") + glob(f"{PLANNER}/{part}/*.safetensors"))
    files += sorted(glob(f"{PLANNER}/{part}/chat_template*"))
    if files and all(Path(f).is_file() for f in files):
        data_files.append((f"share/{NAME}/planner/{part}".rstrip("/"), files))

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=data_files,
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="edge-runtime",
    maintainer_email="maintainers@edge-runtime.invalid",
    description="Lifecycle nodes that serve edge_runtime engines",
    license="Proprietary",
    entry_points={
        "console_scripts": [
            "activate = edge_nodes.activation:main",
            "language_node = edge_nodes.language_node:main",
            "planner_node = edge_nodes.planner_node:main",
        ]
    },
)

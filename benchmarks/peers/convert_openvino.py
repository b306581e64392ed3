"""Writes a Hugging Face directory as OpenVINO's intermediate representation, weights as they are, with the tokenizer.

python -m benchmarks.peers.convert_openvino DIRECTORY FOLDER
"""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from optimum.exporters.openvino import main_export  # type: ignore[import-not-found,unused-ignore]

if __name__ == "__main__":
    main_export(
        sys.argv[1], sys.argv[2], task="text-generation-with-past", local_files_only=True, convert_tokenizer=True
    )

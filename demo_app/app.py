"""The demo as a Space (or `python demo_app/app.py`): the page on the model that ships with the package."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from vlm_attn_demo.run import Runner
from vlm_attn_demo.ui import build, launch_options

demo = build(Runner.load(os.environ.get("VLM_ATTN_DEMO_MODEL", "scenes")))

if __name__ == "__main__":
    demo.launch(**launch_options())

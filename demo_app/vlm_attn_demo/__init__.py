"""The demo page of vlm-attn: one picture, one question, two methods side by side."""

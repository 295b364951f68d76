"""The panel: a page over the same jobs that the command line runs. Only ``panel``, ``events``, ``api`` and ``app`` import gradio."""

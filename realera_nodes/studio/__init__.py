"""The panel: a page over the same jobs that the command line runs. gradio is imported by few of its modules, and by no other."""

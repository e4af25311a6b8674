"""Files: safetensors, torch checkpoints read without torch, Hugging Face names, resumable training state.

Nothing here knows of models or merging methods, and nothing runs code found in a file.
"""

"""A server under load: how fast it answers, whether every answer is right, whether its memory grows.

    python -m eval.load [--requests 1000] [--clients 32] [--out load] [--server http://127.0.0.1:8000]

Starts a server on this machine, or takes one that runs here; no other address is ever sent to. So many
clients ask for so many pictures, each the next as soon as it has one. Afterwards every answer is compared,
bit for bit, with what `megjax.serve.engine` makes of the request in this process, at the batch size that the
answer names and beside other neighbours, and with the picture made alone. Writes `load.json` and `load.png`;
exit code 1 if an answer was lost or wrong.
"""

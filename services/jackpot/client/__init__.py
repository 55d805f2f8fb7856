"""A client of the control plane's REST API: ``jackpot.Client``, and ``jackpot.AsyncClient`` with the same methods.

client = jackpot.Client()                    # JACKPOT_URL and JACKPOT_TOKEN, else http://127.0.0.1:8700
job = client.submit({"policy": …, …})
for event in client.events(job.id): …
client.pull(job.id, "export", Path("model"))
"""

from jackpot.client.asynchronous import AsyncClient
from jackpot.client.conversation import Event
from jackpot.client.sync import Client

__all__ = ["AsyncClient", "Client", "Event"]

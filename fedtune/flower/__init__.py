"""fedtune on a Flower deployment or simulation: Flower moves the messages, fedtune's own rounds make the adapter.

    ServerApp (server.py)                                    ClientApp (client.py, a new process per message)
      FedtuneStrategy: rounds.Round  == packet in an Array ==>    Unix socket (visit.py)
      run folder: PEFT per round     <== packet in an Array ==      resident worker (resident.py): rounds.work, model

Nothing is imported here: the ClientApp's process must stay small, and only `fedtune[flower]` brings Flower.
"""

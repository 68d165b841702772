"""A client that adds a constant of its own, so that no two replies are the same object."""

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    shift = 1e-3 * (1 + context.node_id % 1009)
    arrays = {
        name: Array(array.numpy() + array.numpy().dtype.type(shift))
        for name, array in message.content["arrays"].items()
    }
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10, "loss": 0.1})})
    return Message(content, reply_to=message)

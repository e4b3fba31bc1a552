"""A checkpoint behind openpi's websocket protocol.

wire       openpi-client's msgpack convention for arrays, strict both ways
requests   what a client sends, checked, as a model's inputs; and the model's actions as the robot's
policy     batches of requests through the model
server     websockets, a bounded queue, batches of what waits
"""

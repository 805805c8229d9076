import torch

import fastsam

model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
)
loss_fn = torch.nn.CrossEntropyLoss()
inputs, labels = torch.randn(32, 4), torch.randint(3, (32,))
val_inputs, val_labels = torch.randn(32, 4), torch.randint(3, (32,))


def closure():
    loss = loss_fn(model(inputs), labels)
    loss.backward()
    return loss

"""ImageNet's training transform of torchvision, as a user would write it."""

from torchvision import transforms

pipeline = transforms.Compose(
    [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
)


def crop(sample):  # type: ignore[no-untyped-def]  # a user's function
    """RandomResizedCrop, flip, tensor, normalise; height × width × channel, float32."""
    sample["npy"] = pipeline(sample.pop("jpg")).permute(1, 2, 0).numpy().astype("float32")
    return sample

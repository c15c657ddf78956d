from paretorch.codegen.forms import lower


class TritonRuntime:
    name = "triton"

    def refuses(self, graph=None):
        return "the triton runtime needs a CUDA device"

    def compile(self, graph, example_inputs):
        raise NotImplementedError

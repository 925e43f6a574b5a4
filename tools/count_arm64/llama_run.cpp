// Runs a GGUF with llama.cpp between marks that the plugin sees: llama_run MODEL PROMPTS TOKENS SHALLOW DEPTH.
// Or writes it in another format, a number of `enum llama_ftype`: llama_run MODEL FORMAT OUT.
//
// It runs what tools/count_arm64/device.py runs, on one thread, and prints the number of each mark and what
// ends at it: "prompt of N" or "token after N". The greedy choice is counted with each.
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

namespace {

constexpr long kFirstMark = -4242000;  // as plugin.c has it
constexpr long kGetpgid = 155;
constexpr int kContext = 1024;

struct Runner {
    llama_context *context;
    int vocabulary;
    int marks = 0;

    void mark(const std::string &name) {
        syscall(kGetpgid, kFirstMark - marks);
        std::printf("mark %d %s\n", marks++, name.c_str());
    }

    void clear() { llama_memory_clear(llama_get_memory(context), false); }

    // Adds tokens at a position, and returns the most likely next one.
    int add(const int *ids, int count, int position) {
        llama_batch batch = llama_batch_init(count, 0, 1);
        batch.n_tokens = count;
        for (int i = 0; i < count; i++) {
            batch.token[i] = ids[i];
            batch.pos[i] = position + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = i + 1 == count;
        }
        if (llama_decode(context, batch) != 0) {
            std::fprintf(stderr, "llama_decode failed\n");
            std::exit(1);
        }
        llama_batch_free(batch);
        const float *logits = llama_get_logits_ith(context, -1);
        int best = 0;
        for (int i = 1; i < vocabulary; i++)
            if (logits[i] > logits[best]) best = i;
        return best;
    }
};

int quantize(const char *model, int format, const char *out) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = static_cast<llama_ftype>(format);
    params.allow_requantize = true;
    params.nthread = 1;
    return llama_model_quantize(model, out, &params) == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc == 4) return quantize(argv[1], std::atoi(argv[2]), argv[3]);
    if (argc != 6) {
        std::fprintf(stderr, "usage: llama_run MODEL PROMPTS TOKENS SHALLOW DEPTH\n");
        return 2;
    }
    std::vector<int> prompts;
    std::stringstream list(argv[2]);
    for (std::string one; std::getline(list, one, ',');) prompts.push_back(std::stoi(one));
    const int tokens = std::atoi(argv[3]);
    const int depths[] = {std::atoi(argv[4]), std::atoi(argv[5])};

    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    llama_model *model = llama_model_load_from_file(argv[1], model_params);
    if (model == nullptr) return 1;
    llama_context_params context_params = llama_context_default_params();
    context_params.n_ctx = kContext;
    context_params.n_batch = context_params.n_ubatch = 512;
    context_params.n_threads = context_params.n_threads_batch = 1;
    llama_context *context = llama_init_from_model(model, context_params);
    if (context == nullptr) return 1;

    Runner run{context, llama_vocab_n_tokens(llama_model_get_vocab(model))};
    std::vector<int> ids(kContext);
    unsigned state = 1;
    for (int &id : ids) {
        state = state * 1664525u + 1013904223u;
        id = static_cast<int>((state >> 8) % static_cast<unsigned>(run.vocabulary));
    }
    run.add(ids.data(), 8, 0);  // what a first run allocates
    for (int count : prompts) {
        run.clear();
        run.mark("");
        run.add(ids.data(), count, 0);
        run.mark("prompt of " + std::to_string(count));
    }
    for (int depth : depths) {
        run.clear();
        int token = run.add(ids.data(), depth, 0);
        token = run.add(&token, 1, depth);
        for (int i = 0; i < tokens; i++) {
            run.mark("");
            token = run.add(&token, 1, depth + 1 + i);
            run.mark("token after " + std::to_string(depth));
        }
    }
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    std::printf("peak %ld\n", usage.ru_maxrss * 1024L);
    llama_free(context);
    llama_model_free(model);
    return 0;
}

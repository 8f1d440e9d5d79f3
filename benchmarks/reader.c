/* Asks over kept connections as fast as answers come, and counts. Standard C and Linux.
 *
 * reader ADDRESS PORT CONNECTIONS SECONDS SIZE STATUS COUNT REQUEST
 *
 * REQUEST is the bytes of one, in which each row of # stands for the last digits of a number that is drawn from 0 to
 * COUNT - 1 each time.
 * SIZE is the bytes of body to be read behind each head. Prints requests, seconds, microseconds of its own CPU, and of the
 * median and the 99th percentile of the answers. Ends with 1 when an answer has another status or the peer goes away.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { HEAD = 8192, BLOCK = 1 << 20, KEPT = 1 << 22 };

struct peer {
    int socket;
    int filled;       /* bytes of the head so far */
    long left;        /* bytes of the body; -1: the head is not whole */
    double asked;
    char head[HEAD];
};

static const char *request;
static char asked[HEAD], block[BLOCK];
static unsigned seed = 1;
static long count, size, kept;
static int status;
static float *taken;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void give_up(const char *why) {
    fprintf(stderr, "reader: %s\n", why);
    exit(1);
}

static void ask(struct peer *peer) {
    long number = rand_r(&seed) % count;
    size_t length = strlen(request);
    memcpy(asked, request, length);
    long rest = number;
    for (char *place = asked + length; place-- > asked;) {
        if (*place == '#') *place = '0' + rest % 10, rest /= 10;
        else rest = number;
    }
    peer->filled = 0, peer->left = -1, peer->asked = now();
    if (send(peer->socket, asked, length, 0) != (ssize_t)length) give_up("a request did not fit");
}

static void end_head(struct peer *peer) {
    char *end = memmem(peer->head, peer->filled, "\r\n\r\n", 4);
    if (end == NULL) {
        if (peer->filled == HEAD) give_up("the head is too long");
        return;
    }
    if (atoi(peer->head + 9) != status) give_up(peer->head);
    peer->left = size - (peer->head + peer->filled - end - 4);
    if (peer->left < 0) give_up("more came than was asked for");
}

/* Take what there is; 1: the answer is whole. */
static int take(struct peer *peer) {
    for (;;) {
        if (peer->left == 0) return 1;
        int in_head = peer->left < 0;
        char *where = in_head ? peer->head + peer->filled : block;
        long room = in_head ? HEAD - peer->filled : peer->left < BLOCK ? peer->left : BLOCK;
        ssize_t got = recv(peer->socket, where, room, MSG_DONTWAIT);
        if (got == 0) give_up("the peer has gone");
        if (got < 0) {
            if (errno == EAGAIN) return 0;
            give_up(strerror(errno));
        }
        if (in_head) peer->filled += got, end_head(peer);
        else peer->left -= got;
    }
}

static int by_size(const void *one, const void *other) {
    float difference = *(const float *)one - *(const float *)other;
    return difference < 0 ? -1 : difference > 0;
}

int main(int argc, char **argv) {
    if (argc != 9) give_up("ADDRESS PORT CONNECTIONS SECONDS SIZE STATUS COUNT REQUEST");
    int connections = atoi(argv[3]);
    double seconds = atof(argv[4]);
    size = atol(argv[5]), status = atoi(argv[6]), count = atol(argv[7]), request = argv[8];
    taken = malloc(KEPT * sizeof *taken);
    struct peer *peers = calloc(connections, sizeof *peers);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) give_up("ADDRESS is an IPv4 address");
    int poll = epoll_create1(0), one = 1;
    for (int number = 0; number < connections; number++) {
        struct peer *peer = &peers[number];
        peer->socket = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(peer->socket, (struct sockaddr *)&address, sizeof address)) give_up(strerror(errno));
        setsockopt(peer->socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer};
        epoll_ctl(poll, EPOLL_CTL_ADD, peer->socket, &event);
    }
    double start = now(), time = start;
    long requests = 0;
    for (int number = 0; number < connections; number++) ask(&peers[number]);
    while (time - start < seconds) {
        struct epoll_event events[64];
        int ready = epoll_wait(poll, events, 64, 100);
        for (int number = 0; number < ready; number++) {
            struct peer *peer = events[number].data.ptr;
            if (!take(peer)) continue;
            if (kept < KEPT) taken[kept++] = now() - peer->asked;
            requests++;
            ask(peer);
        }
        time = now();
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    qsort(taken, kept, sizeof *taken, by_size);
    if (!requests) give_up("no answer came in time");
    printf("%ld %.6f %.0f %.1f %.1f\n", requests, time - start, cpu * 1e6, taken[kept / 2] * 1e6,
           taken[kept * 99 / 100] * 1e6);
    return 0;
}

/*
 * Many boards on pseudo terminals, each behind a serial line of its own, in one process and one epoll loop.
 *
 * What it models: bytes take their time on the line in both directions, each direction on its own; a command takes effect
 * when its last byte has arrived, and the answer begins then. By how much this process is late with an answer, since the
 * kernel woke it late, is not time on the line: the next bytes count as sent that much earlier.
 * What it does not model: the time that flash needs (nothing), baud rate mismatch, noise, a reset.
 *
 * usage: fleet --mode stk500|window --devices N --baud N --flash-bytes N --folder DIR
 *
 * Device n is DIR/ttyN and has the bytes from n * flash-bytes of DIR/flash. One line "ready" is written to standard output;
 * the process ends when standard input does.
 *
 * stk500: STK500 as of Atmel AVR061 rev. 2525B, the commands of a boot loader, as an ATmega328P. Written from that
 *         specification; shares nothing with edged's mapper.
 * window: made for this benchmark (bench/windowed.py). Frames 01 SEQ 256 bytes CRC16, answered by 06 NEXT ~NEXT: all frames
 *         before NEXT have been stored. 02 starts from the beginning, with the same answer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MOST_DEVICES 256
#define MESSAGE_BYTES 512
#define ANSWERS 64
#define BITS_PER_BYTE 10
#define NEVER UINT64_MAX
/* what a serial driver takes before it lets a writer wait */
#define DRIVER_BYTES 4096

struct answer {
	uint64_t at;
	unsigned count;
	uint8_t bytes[260];
};

struct device {
	int master;
	uint8_t *flash;
	int unread; /* the line was full: bytes wait in the terminal */
	uint64_t in_free, out_free; /* when the last byte so far is over the line */
	uint64_t late; /* by how much this process was late with the last answer */
	uint8_t message[MESSAGE_BYTES];
	unsigned have;
	uint32_t address;
	uint8_t expected;
	uint32_t frames;
	struct answer answers[ANSWERS];
	unsigned first, count;
};

static struct device devices[MOST_DEVICES];
static unsigned device_count = 64;
static uint32_t flash_bytes;
static uint64_t byte_ns;
static int windowed;

static void die(const char *what)
{
	fprintf(stderr, "fleet: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---------------------------------------------------------------- answers */

static void answer(struct device *d, uint64_t at, const uint8_t *bytes, unsigned count)
{
	if (d->count == ANSWERS || count > sizeof d->answers->bytes) {
		errno = ENOBUFS;
		die("an answer that nobody reads");
	}
	struct answer *a = &d->answers[(d->first + d->count++) % ANSWERS];
	d->out_free = (at > d->out_free ? at : d->out_free) + count * byte_ns;
	a->at = d->out_free;
	a->count = count;
	memcpy(a->bytes, bytes, count);
}

static void deliver(struct device *d, uint64_t now)
{
	while (d->count && d->answers[d->first].at <= now) {
		struct answer *a = &d->answers[d->first];
		/* a port that nobody has open loses what comes */
		if (write(d->master, a->bytes, a->count) < 0 && errno != EAGAIN && errno != EIO)
			die("write");
		d->late = now - a->at;
		d->first = (d->first + 1) % ANSWERS;
		d->count--;
	}
}

/* ---------------------------------------------------------------- STK500 (AVR061) */

enum {
	STK_OK = 0x10, STK_INSYNC = 0x14, STK_NOSYNC = 0x15, CRC_EOP = 0x20,
	GET_SYNC = 0x30, GET_SIGN_ON = 0x31, GET_PARAMETER = 0x41, SET_DEVICE = 0x42, SET_DEVICE_EXT = 0x45,
	ENTER_PROGMODE = 0x50, LEAVE_PROGMODE = 0x51, LOAD_ADDRESS = 0x55, UNIVERSAL = 0x56,
	PROG_PAGE = 0x64, READ_PAGE = 0x74, READ_SIGN = 0x75
};

/* Bytes of the command at the beginning of m with its EOP, as far as can be told from the n that are there. */
static unsigned stk_length(const uint8_t *m, unsigned n)
{
	switch (m[0]) {
	case GET_PARAMETER: return 3;
	case SET_DEVICE: return 22;
	case SET_DEVICE_EXT: return n < 2 ? 2 : 2u + m[1];
	case LOAD_ADDRESS: return 4;
	case UNIVERSAL: return 6;
	case PROG_PAGE: return n < 4 ? 4 : 5u + ((unsigned)m[1] << 8 | m[2]);
	case READ_PAGE: return 5;
	default: return 2;
	}
}

static unsigned stk_page(struct device *d, const uint8_t *m, uint8_t *out)
{
	unsigned size = (unsigned)m[1] << 8 | m[2];
	if (m[3] != 'F' || size > 256 || d->address + size > flash_bytes)
		return 0;
	if (m[0] == PROG_PAGE) {
		memcpy(d->flash + d->address, m + 4, size);
		return 0;
	}
	memcpy(out, d->flash + d->address, size);
	return size;
}

static void stk_run(struct device *d, const uint8_t *m, unsigned n, uint64_t at)
{
	uint8_t out[260] = {STK_INSYNC};
	unsigned k = 1;
	if (m[n - 1] != CRC_EOP) {
		out[0] = STK_NOSYNC;
		answer(d, at, out, 1);
		return;
	}
	switch (m[0]) {
	case GET_PARAMETER: out[k++] = m[1] == 0x81 ? 1 : m[1] == 0x82 ? 2 : 3; break;
	case LOAD_ADDRESS: d->address = 2u * (m[1] | (uint32_t)m[2] << 8); break;
	case UNIVERSAL: out[k++] = 0; break;
	case PROG_PAGE:
	case READ_PAGE: k += stk_page(d, m, out + 1); break;
	case READ_SIGN: memcpy(out + 1, "\x1e\x95\x0f", 3), k += 3; break;
	}
	out[k++] = STK_OK;
	answer(d, at, out, k);
}

/* ---------------------------------------------------------------- the window protocol */

enum { FRAME = 0x01, START = 0x02, ACK = 0x06, DATA_BYTES = 256, FRAME_BYTES = DATA_BYTES + 4 };

static uint16_t crc16(const uint8_t *bytes, unsigned count)
{
	static uint16_t table[256];
	if (!table[1])
		for (unsigned i = 0; i < 256; i++) {
			uint16_t c = (uint16_t)(i << 8);
			for (int bit = 0; bit < 8; bit++)
				c = (uint16_t)(c & 0x8000 ? c << 1 ^ 0x1021 : c << 1);
			table[i] = c;
		}
	uint16_t crc = 0;
	for (unsigned i = 0; i < count; i++)
		crc = (uint16_t)(crc << 8 ^ table[(crc >> 8 ^ bytes[i]) & 0xff]);
	return crc;
}

static unsigned window_length(const uint8_t *m)
{
	return m[0] == FRAME ? FRAME_BYTES : 1;
}

static void window_run(struct device *d, const uint8_t *m, uint64_t at)
{
	if (m[0] == START)
		d->expected = 0, d->frames = 0;
	else if (m[0] != FRAME)
		return;
	else if (m[1] == d->expected && (d->frames + 1) * DATA_BYTES <= flash_bytes &&
		 crc16(m, FRAME_BYTES - 2) == (m[FRAME_BYTES - 2] << 8 | m[FRAME_BYTES - 1])) {
		memcpy(d->flash + d->frames++ * DATA_BYTES, m + 2, DATA_BYTES);
		d->expected++;
	}
	uint8_t out[3] = {ACK, d->expected, (uint8_t)~d->expected};
	answer(d, at, out, sizeof out);
}

/* ---------------------------------------------------------------- the line */

/* Byte i of what was just read has arrived at begin + (i + 1) * byte_ns. */
static void take(struct device *d, const uint8_t *bytes, unsigned count, uint64_t now)
{
	uint64_t sent = now - d->late;
	uint64_t begin = d->in_free > sent ? d->in_free : sent;
	d->in_free = begin + count * byte_ns;
	for (unsigned i = 0; i < count;) {
		d->message[d->have++] = bytes[i++];
		unsigned length = windowed ? window_length(d->message) : stk_length(d->message, d->have);
		if (length > MESSAGE_BYTES) {
			d->have = 0;
			continue;
		}
		unsigned missing = length - d->have, there = count - i;
		if (d->have < length && there) {
			unsigned step = windowed || d->have >= 4 ? (missing < there ? missing : there) : 0;
			memcpy(d->message + d->have, bytes + i, step);
			d->have += step, i += step;
		}
		if (d->have < length)
			continue;
		uint64_t at = begin + i * byte_ns;
		if (windowed)
			window_run(d, d->message, at);
		else
			stk_run(d, d->message, d->have, at);
		d->have = 0;
	}
}

static void read_line(struct device *d, uint64_t now)
{
	uint8_t bytes[1024];
	for (;;) {
		d->unread = d->in_free > now + DRIVER_BYTES * byte_ns;
		if (d->unread)
			return;
		ssize_t got = read(d->master, bytes, sizeof bytes);
		if (got <= 0)
			return; /* EAGAIN, or EIO: closed at the other end */
		take(d, bytes, (unsigned)got, now);
	}
}

static uint64_t next_due(void)
{
	uint64_t due = NEVER;
	for (unsigned n = 0; n < device_count; n++) {
		struct device *d = &devices[n];
		if (d->count && d->answers[d->first].at < due)
			due = d->answers[d->first].at;
		if (d->unread && d->in_free - DRIVER_BYTES * byte_ns < due)
			due = d->in_free - DRIVER_BYTES * byte_ns;
	}
	return due;
}

static void serve_due(void)
{
	uint64_t now = now_ns();
	for (unsigned n = 0; n < device_count; n++) {
		deliver(&devices[n], now);
		if (devices[n].unread)
			read_line(&devices[n], now);
	}
}

static void serve(int poller)
{
	struct epoll_event ready[MOST_DEVICES];
	for (;;) {
		uint64_t due = next_due(), now = now_ns(), left = due > now ? due - now : 0;
		struct timespec wait = {.tv_sec = (time_t)(left / 1000000000u), .tv_nsec = (long)(left % 1000000000u)};
		int count = epoll_pwait2(poller, ready, MOST_DEVICES, due == NEVER ? NULL : &wait, NULL);
		if (count < 0 && errno != EINTR)
			die("epoll");
		now = now_ns();
		for (int i = 0; i < count; i++) {
			if (!ready[i].data.ptr)
				return; /* standard input: whoever started this is gone */
			read_line(ready[i].data.ptr, now);
		}
		serve_due();
	}
}

/* ---------------------------------------------------------------- start */

static void make_port(struct device *d, unsigned number, const char *folder, int poller)
{
	char slave[64], link_path[4096];
	struct termios t;
	d->master = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (d->master < 0 || grantpt(d->master) || unlockpt(d->master) || ptsname_r(d->master, slave, sizeof slave))
		die("pty");
	/* raw before any client: the terminal's echo would feed the device its own words */
	if (tcgetattr(d->master, &t))
		die(slave);
	cfmakeraw(&t);
	if (tcsetattr(d->master, TCSANOW, &t))
		die(slave);
	snprintf(link_path, sizeof link_path, "%s/tty%u", folder, number);
	if (symlink(slave, link_path))
		die(link_path);
	/* edges: a port without a client says "hung up" for ever */
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = d};
	if (epoll_ctl(poller, EPOLL_CTL_ADD, d->master, &event))
		die("epoll");
}

static uint8_t *map_flash(const char *folder)
{
	char path[4096];
	size_t bytes = (size_t)device_count * flash_bytes;
	snprintf(path, sizeof path, "%s/flash", folder);
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	struct stat status;
	if (fd < 0 || fstat(fd, &status) || ftruncate(fd, (off_t)bytes))
		die(path);
	uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		die(path);
	if (status.st_size == 0)
		memset(map, 0xff, bytes);
	close(fd);
	return map;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"mode", required_argument, NULL, 'm'},	   {"devices", required_argument, NULL, 'n'},
		{"baud", required_argument, NULL, 'b'},	   {"flash-bytes", required_argument, NULL, 's'},
		{"folder", required_argument, NULL, 'f'}, {NULL, 0, NULL, 0}};
	const char *folder = ".";
	unsigned baud = 115200;
	int option;
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (option) {
		case 'm': windowed = strcmp(optarg, "window") == 0; break;
		case 'n': device_count = (unsigned)atoi(optarg); break;
		case 'b': baud = (unsigned)atoi(optarg); break;
		case 's': flash_bytes = (uint32_t)atoi(optarg); break;
		case 'f': folder = optarg; break;
		default: return 2;
		}
	if (!baud || !flash_bytes || !device_count || device_count > MOST_DEVICES)
		return 2;
	byte_ns = 1000000000ull * BITS_PER_BYTE / baud;
	/* the kernel may be late by 50 us otherwise, half of a byte's time */
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	int poller = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event lifeline = {.events = EPOLLIN | EPOLLHUP, .data.ptr = NULL};
	if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &lifeline))
		die("standard input");
	uint8_t *flash = map_flash(folder);
	for (unsigned n = 0; n < device_count; n++) {
		devices[n].flash = flash + (size_t)n * flash_bytes;
		make_port(&devices[n], n, folder, poller);
	}
	puts("ready");
	fflush(stdout);
	serve(poller);
	return 0;
}

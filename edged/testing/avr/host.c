/*
 * An ATmega board on a pseudo terminal: the microcontroller (libsimavr), its boot loader, its flash in a file,
 * and the serial adapter in front of it.
 *
 * What it models: a reset when a client opens the port (an adapter's DTR edge), bytes at the line rate in both
 * directions, NOR flash (a page write only clears bits), loss of the line, loss of power.
 * What it does not model: baud rate mismatch, parity, the 4.5 ms that a real part needs per page erase and write,
 * lock bits.
 *
 * usage: host --mcu NAME --boot RAW --boot-at ADDRESS --port LINK --flash FILE
 *             [--stats FILE] [--tap FILE] [--baud N] [--lifeline]
 *
 * SIGTERM, SIGINT  end        SIGUSR1  unplug the line      SIGUSR2  plug it in again
 * SIGHUP           the board loses power for a moment; its line stays
 * SIGURG           its reset is pulled, as by a rise of DTR that no terminal can pass on
 * --lifeline       end when standard input reaches its end: the process that started this one is gone
 *
 * One line "ready" is written to standard output when the port is there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <simavr/avr_flash.h>
#include <simavr/avr_uart.h>
#include <simavr/sim_avr.h>
#include <simavr/sim_io.h>

#define CLOCK_HZ 16000000u
#define CYCLES_PER_US (CLOCK_HZ / 1000000u)
#define SLICE_BUSY_US 250u   /* bytes move: an answer is late by this much at most */
#define SLICE_AWAKE_US 1000u /* code runs, the line is silent */
#define SLICE_ASLEEP_US 4000u
#define BUSY_FOR_CYCLES (5000u * CYCLES_PER_US)
#define MAX_LAG_US 20000u
#define EVENT_LAG_MS 200
#define RX_QUEUE 256u
#define TX_QUEUE 1024u
#define GUARD_BYTES 4096u

/* SPMCSR, ATmega328P data sheet 27.9.1 and ATmega2560 data sheet 29.9.1: the same address and bits in both */
#define SPMCSR 0x57
#define SELFPRGEN 0x01
#define PGERS 0x02
#define PGWRT 0x04
#define REG_Z 30

struct part {
	const char *name;
	uint32_t page_bytes;
};

static const struct part PARTS[] = {
	{"atmega328p", 128},
	{"atmega2560", 256},
};

/* In the --stats file, little endian, in this order. The reader is edged.testing.avr. */
struct counters {
	uint64_t power_resets;
	uint64_t external_resets;
	uint64_t watchdog_resets;
	uint64_t pages_erased;
	uint64_t pages_written;
	uint64_t bytes_in;
	uint64_t bytes_out;
	uint64_t opens;
};

enum cause { CAUSE_WATCHDOG, CAUSE_POWER, CAUSE_EXTERNAL };

static avr_t *avr;
static const struct part *part;
static struct counters *counters;
static avr_irq_t *uart_input;
static enum cause next_cause = CAUSE_WATCHDOG;

static const char *link_path;
static char slave_path[64];
static int master = -1, events = -1, watch = -1, tap = -1;
static int openers;
static int undrained; /* a client has closed, and what it sent last is not read yet */

static uint8_t rx[RX_QUEUE], tx[TX_QUEUE];
static unsigned rx_head, rx_count, tx_count;
static avr_cycle_count_t next_rx, cycles_per_byte, last_traffic;

static avr_cycle_count_t base_cycle;
static uint64_t base_us;

static void die(const char *what)
{
	fprintf(stderr, "avr host: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

/* ---------------------------------------------------------------- the part */

static void silent(avr_t *which, const int level, const char *format, va_list arguments)
{
	(void)which, (void)level, (void)format, (void)arguments;
}

static void on_reset(avr_io_t *io)
{
	(void)io;
	switch (next_cause) {
	case CAUSE_POWER: counters->power_resets++; break;
	case CAUSE_EXTERNAL: counters->external_resets++; break;
	case CAUSE_WATCHDOG: counters->watchdog_resets++; break;
	}
	next_cause = CAUSE_WATCHDOG;
}

static avr_io_t *flash_module(void)
{
	avr_io_t *io = avr->io_port;
	while (io && (!io->kind || strcmp(io->kind, "flash") != 0))
		io = io->next;
	return io;
}

/* libsimavr replaces a page on PGWRT; a real page that was not erased before keeps its cleared bits. */
static int write_page(uint32_t ctl, void *parameter)
{
	uint8_t before[256];
	uint32_t z = avr->data[REG_Z] | (uint32_t)avr->data[REG_Z + 1] << 8;
	if (avr->rampz)
		z |= (uint32_t)avr->data[avr->rampz] << 16;
	z &= ~(part->page_bytes - 1);
	if (z + part->page_bytes > avr->flashend + 1)
		return -1;
	memcpy(before, avr->flash + z, part->page_bytes);
	avr_io_t *flash = flash_module();
	int result = flash->ioctl(flash, ctl, parameter);
	for (uint32_t i = 0; i < part->page_bytes; i++)
		avr->flash[z + i] &= before[i];
	counters->pages_written++;
	return result;
}

static int on_ioctl(avr_io_t *io, uint32_t ctl, void *parameter)
{
	(void)io;
	if (ctl != AVR_IOCTL_FLASH_SPM)
		return -1;
	switch (avr->data[SPMCSR] & (SELFPRGEN | PGERS | PGWRT)) {
	case SELFPRGEN | PGERS: counters->pages_erased++; return -1;
	case SELFPRGEN | PGWRT: return write_page(ctl, parameter);
	}
	return -1;
}

static avr_io_t observer = {.kind = "observer", .reset = on_reset, .ioctl = on_ioctl};

static void on_sleep(avr_t *which, avr_cycle_count_t cycles)
{
	(void)which, (void)cycles; /* run_until() keeps the time */
}

static void on_uart_output(avr_irq_t *irq, uint32_t value, void *parameter)
{
	(void)irq, (void)parameter;
	last_traffic = avr->cycle;
	counters->bytes_out++;
	if (tx_count < TX_QUEUE)
		tx[tx_count++] = (uint8_t)value;
}

static void *map_file(const char *path, size_t bytes, void *where)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	if (fd < 0)
		die(path);
	struct stat status;
	if (fstat(fd, &status) != 0 || (status.st_size == 0 && ftruncate(fd, (off_t)bytes) != 0))
		die(path);
	if (status.st_size != 0 && (size_t)status.st_size != bytes) {
		errno = EINVAL;
		die(path);
	}
	void *map = mmap(where, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (where ? MAP_FIXED : 0), fd, 0);
	if (map == MAP_FAILED)
		die(path);
	if (status.st_size == 0 && where)
		memset(map, 0xff, bytes);
	close(fd);
	return map;
}

/* A shared mapping survives kill -9 at any instant with what SPM had done, as flash survives a power cut. */
static void use_flash_file(const char *path)
{
	size_t bytes = avr->flashend + 1;
	uint8_t *space = mmap(NULL, bytes + GUARD_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (space == MAP_FAILED)
		die("mmap");
	memcpy(space + bytes, avr->flash + bytes, 2); /* libsimavr keeps an opcode of its own behind the end */
	map_file(path, bytes, space);
	free(avr->flash);
	avr->flash = space;
}

static void load_boot(const char *path, uint32_t address)
{
	static uint8_t code[16384];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, code, sizeof code);
	if (got <= 0 || address + (size_t)got > avr->flashend + 1)
		die(path);
	close(fd);
	memcpy(avr->flash + address, code, (size_t)got);
	avr->reset_pc = address;
}

static void make_part(const char *name, const char *flash)
{
	for (size_t i = 0; i < sizeof PARTS / sizeof *PARTS; i++)
		if (strcmp(PARTS[i].name, name) == 0)
			part = &PARTS[i];
	avr = part ? avr_make_mcu_by_name(name) : NULL;
	if (!avr) {
		errno = EINVAL;
		die(name);
	}
	avr_global_logger_set(silent);
	avr_init(avr);
	avr->frequency = CLOCK_HZ;
	avr->sleep = on_sleep;
	use_flash_file(flash);
	avr_register_io(avr, &observer);
	/* libsimavr naps at each poll of an empty receiver; time is kept here */
	uint32_t flags = 0;
	avr_ioctl(avr, AVR_IOCTL_UART_SET_FLAGS('0'), &flags);
	uart_input = avr_io_getirq(avr, AVR_IOCTL_UART_GETIRQ('0'), UART_IRQ_INPUT);
	avr_irq_register_notify(
		avr_io_getirq(avr, AVR_IOCTL_UART_GETIRQ('0'), UART_IRQ_OUTPUT), on_uart_output, NULL);
}

static void reset_part(enum cause cause)
{
	next_cause = cause;
	avr_reset(avr);
	avr_regbit_set(avr, cause == CAUSE_POWER ? avr->reset_flags.porf : avr->reset_flags.extrf);
	rx_count = tx_count = 0;
	last_traffic = avr->cycle;
}

/* ---------------------------------------------------------------- time */

static avr_cycle_count_t slice_end(avr_t *which, avr_cycle_count_t when, void *parameter)
{
	(void)which, (void)when, (void)parameter;
	return 0;
}

static int halted(void)
{
	return avr->state != cpu_Running && avr->state != cpu_Sleeping;
}

static void feed_uart(void)
{
	avr_raise_irq(uart_input, rx[rx_head]);
	rx_head = (rx_head + 1) % RX_QUEUE;
	rx_count--;
	next_rx += cycles_per_byte;
	last_traffic = avr->cycle;
}

static void run_until(avr_cycle_count_t target)
{
	while (avr->cycle < target) {
		avr_cycle_count_t stop = target;
		if (rx_count && next_rx <= avr->cycle)
			feed_uart();
		if (rx_count && next_rx < stop)
			stop = next_rx > avr->cycle ? next_rx : avr->cycle + 1;
		if (halted()) {
			avr->cycle = stop;
			continue;
		}
		/* the timer bounds a sleep of the part, the limit bounds its running */
		avr->run_cycle_limit = stop - avr->cycle;
		avr_cycle_timer_register(avr, stop - avr->cycle, slice_end, NULL);
		while (avr->cycle < stop && !halted())
			avr->run(avr);
	}
}

/* The part never runs ahead of the wall clock, and does not race to catch up after this host was held up:
 * a boot loader's one second must not be shorter for its client. */
static void run_to_now(void)
{
	uint64_t now = now_us();
	avr_cycle_count_t target = base_cycle + (now - base_us) * CYCLES_PER_US;
	if (target > avr->cycle + MAX_LAG_US * CYCLES_PER_US) {
		base_us = now;
		base_cycle = avr->cycle + MAX_LAG_US * CYCLES_PER_US;
		target = base_cycle;
	}
	run_until(target);
}

static unsigned slice_us(void)
{
	if (rx_count || avr->cycle - last_traffic < BUSY_FOR_CYCLES)
		return SLICE_BUSY_US;
	return avr->state == cpu_Running ? SLICE_AWAKE_US : SLICE_ASLEEP_US;
}

/* ---------------------------------------------------------------- the line */

static void plug(void)
{
	if (master >= 0)
		return;
	master = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (master < 0 || grantpt(master) || unlockpt(master) || ptsname_r(master, slave_path, sizeof slave_path))
		die("pty");
	/* Raw before any client: the terminal's echo would feed the part its own words. Opening and closing it
	 * also brings the master to the hung-up state that tells "no client". */
	int slave = open(slave_path, O_RDWR | O_NOCTTY | O_CLOEXEC);
	struct termios t;
	if (slave < 0 || tcgetattr(slave, &t))
		die(slave_path);
	cfmakeraw(&t);
	if (tcsetattr(slave, TCSANOW, &t))
		die(slave_path);
	close(slave);
	openers = 0;
	watch = inotify_add_watch(events, slave_path, IN_OPEN | IN_CLOSE);
	if (watch < 0)
		die("inotify");
	char fresh[4096];
	snprintf(fresh, sizeof fresh, "%s.%d", link_path, (int)getpid());
	unlink(fresh);
	if (symlink(slave_path, fresh) || rename(fresh, link_path))
		die(link_path);
}

static void unplug(void)
{
	if (master < 0)
		return;
	unlink(link_path);
	inotify_rm_watch(events, watch);
	close(master);
	master = -1;
	openers = undrained = 0;
	rx_count = tx_count = 0;
}

static int hung_up(void)
{
	struct pollfd p = {.fd = master, .events = 0};
	return poll(&p, 1, 0) > 0 && (p.revents & POLLHUP);
}

static void take_bytes(const uint8_t *bytes, size_t count)
{
	counters->bytes_in += count;
	if (tap >= 0 && write(tap, bytes, count) < 0)
		die("tap");
	if (!rx_count && next_rx < avr->cycle + cycles_per_byte)
		next_rx = avr->cycle + cycles_per_byte;
	for (size_t i = 0; i < count && rx_count < RX_QUEUE; i++)
		rx[(rx_head + rx_count++) % RX_QUEUE] = bytes[i];
}

static void read_line(void)
{
	uint8_t bytes[RX_QUEUE / 2];
	if (rx_count > RX_QUEUE / 2)
		return;
	ssize_t got = read(master, bytes, sizeof bytes);
	if (got > 0)
		take_bytes(bytes, (size_t)got);
}

/* A client that closes has its last bytes sent, as a driver does before it lets go; beyond the queue they are lost. */
static void drain_line(void)
{
	uint8_t bytes[RX_QUEUE];
	ssize_t got;
	while ((got = read(master, bytes, sizeof bytes)) > 0)
		take_bytes(bytes, (size_t)got);
}

static void write_line(void)
{
	/* a driver's full buffer loses bytes too, so a short write is not repeated */
	if (tx_count && openers && write(master, tx, tx_count) < 0 && errno != EAGAIN && errno != EIO)
		die("write");
	tx_count = 0;
}

static void on_event(const struct inotify_event *event)
{
	if (event->wd != watch)
		return;
	if (event->mask & IN_OPEN) {
		counters->opens++;
		if (openers++ == 0) {
			/* the next client was quicker than this host: what the one before sent is not for the part after its
			 * reset. What the next one has sent by now is lost too, as it is with a part that is being reset. */
			if (undrained)
				drain_line();
			undrained = 0;
			reset_part(CAUSE_EXTERNAL);
		}
	} else if ((event->mask & IN_CLOSE) && openers > 0) {
		undrained = --openers == 0;
	}
}

/* A client's open() has the line before it has its event. */
static int more_events(int timeout_ms)
{
	struct pollfd p = {.fd = events, .events = POLLIN};
	return poll(&p, 1, timeout_ms) > 0;
}

static void read_events(void)
{
	char buffer[4096] __attribute__((aligned(__alignof__(struct inotify_event))));
	ssize_t got = read(events, buffer, sizeof buffer);
	if (got <= 0)
		return;
	for (char *at = buffer; at < buffer + got;) {
		const struct inotify_event *event = (const struct inotify_event *)at;
		on_event(event);
		at += sizeof *event + event->len;
	}
	if (master < 0)
		return;
	/* equal events that nobody read yet are merged by the kernel, so the count is held against the line's state */
	if (hung_up()) {
		openers = 0;
		drain_line();
		undrained = 0;
	} else if (openers == 0 && !more_events(EVENT_LAG_MS)) {
		openers = 1;
	}
}

/* ---------------------------------------------------------------- the loop */

static void read_signal(int signals)
{
	struct signalfd_siginfo info;
	if (read(signals, &info, sizeof info) != sizeof info)
		return;
	switch (info.ssi_signo) {
	case SIGUSR1: unplug(); break;
	case SIGUSR2: plug(); break;
	case SIGHUP: reset_part(CAUSE_POWER); break;
	case SIGURG: reset_part(CAUSE_EXTERNAL); break;
	default:
		unplug();
		exit(0);
	}
}

static void wait_and_serve(int signals, int lifeline, unsigned us)
{
	struct pollfd p[4] = {
		{.fd = signals, .events = POLLIN},
		{.fd = events, .events = POLLIN},
		{.fd = openers && rx_count <= RX_QUEUE / 2 ? master : -1, .events = POLLIN},
		{.fd = lifeline, .events = POLLIN},
	};
	struct timespec t = {.tv_sec = 0, .tv_nsec = (long)us * 1000};
	if (ppoll(p, 4, &t, NULL) <= 0)
		return;
	if (p[0].revents)
		read_signal(signals);
	if (p[1].revents)
		read_events();
	if (p[2].revents && openers && master >= 0)
		read_line();
	if (p[3].revents) {
		char byte;
		if (read(lifeline, &byte, 1) <= 0) {
			unplug();
			exit(0);
		}
	}
}

static int catch_signals(void)
{
	sigset_t set;
	sigemptyset(&set);
	const int wanted[] = {SIGTERM, SIGINT, SIGHUP, SIGURG, SIGUSR1, SIGUSR2};
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		sigaddset(&set, wanted[i]);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

int main(int argc, char **argv)
{
	static const struct option OPTIONS[] = {
		{"mcu", 1, 0, 'm'}, {"boot", 1, 0, 'b'}, {"boot-at", 1, 0, 'a'},
		{"port", 1, 0, 'p'}, {"flash", 1, 0, 'f'}, {"stats", 1, 0, 's'},
		{"tap", 1, 0, 't'}, {"baud", 1, 0, 'r'}, {"lifeline", 0, 0, 'l'}, {0, 0, 0, 0},
	};
	const char *mcu = NULL, *boot = NULL, *flash = NULL, *stats = NULL, *tap_path = NULL;
	unsigned long baud = 115200, boot_at = 0;
	int lifeline = -1, option;
	while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
		switch (option) {
		case 'm': mcu = optarg; break;
		case 'b': boot = optarg; break;
		case 'a': boot_at = strtoul(optarg, NULL, 0); break;
		case 'p': link_path = optarg; break;
		case 'f': flash = optarg; break;
		case 's': stats = optarg; break;
		case 't': tap_path = optarg; break;
		case 'r': baud = strtoul(optarg, NULL, 10); break;
		case 'l': lifeline = STDIN_FILENO; break;
		default: return 2;
		}
	}
	if (!mcu || !boot || !link_path || !flash || baud == 0) {
		fprintf(stderr, "avr host: --mcu, --boot, --port and --flash are needed\n");
		return 2;
	}
	static struct counters unseen;
	counters = stats ? map_file(stats, sizeof *counters, NULL) : &unseen;
	if (tap_path && (tap = open(tap_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644)) < 0)
		die(tap_path);
	int signals = catch_signals();
	events = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	prctl(PR_SET_TIMERSLACK, 1000UL);

	make_part(mcu, flash);
	load_boot(boot, (uint32_t)boot_at);
	cycles_per_byte = (avr_cycle_count_t)CLOCK_HZ * 10 / baud; /* start, eight data bits, stop */
	reset_part(CAUSE_POWER);
	plug();
	base_us = now_us();
	base_cycle = avr->cycle;
	puts("ready");
	fflush(stdout);
	for (;;) {
		run_to_now();
		write_line();
		wait_and_serve(signals, lifeline, slice_us());
	}
}

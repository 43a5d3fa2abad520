/*
 * Modem lines for pseudo terminals, to be preloaded into QEMU.
 *
 * A board's reset hangs on DTR. QEMU hands the guest's DTR on to the terminal behind a serial port, and a pseudo
 * terminal has none. Here it has: its lines are kept, and at each rise of DTR the process that plays the board is
 * sent SIGURG, which is its reset.
 *
 * GUEST_DTR=/dev/pts/N=PID[,/dev/pts/M=PID...]
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#define FILES 1024
#define ALWAYS_UP (TIOCM_CTS | TIOCM_DSR | TIOCM_CAR)

static int lines[FILES];

static pid_t board_behind(int fd)
{
	char path[64];
	const char *all = getenv("GUEST_DTR");
	if (!all || fd < 0 || fd >= FILES || ttyname_r(fd, path, sizeof path))
		return 0;
	size_t length = strlen(path);
	for (const char *at = all; (at = strstr(at, path)); at += length)
		if (at[length] == '=')
			return (pid_t)atoi(at + length + 1);
	return 0;
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*next)(int, unsigned long, void *);
	va_list arguments;
	va_start(arguments, request);
	void *argument = va_arg(arguments, void *);
	va_end(arguments);
	if (!next)
		next = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
	pid_t board = request == TIOCMGET || request == TIOCMSET ? board_behind(fd) : 0;
	if (board <= 0)
		return next(fd, request, argument);
	int *bits = argument;
	if (request == TIOCMGET) {
		*bits = lines[fd] | ALWAYS_UP;
		return 0;
	}
	if (*bits & ~lines[fd] & TIOCM_DTR) {
		/* a wire keeps nothing for a port that was closed */
		tcflush(fd, TCIFLUSH);
		kill(board, SIGURG);
	}
	lines[fd] = *bits & (TIOCM_DTR | TIOCM_RTS);
	return 0;
}

/*
 * The application that tests put on a simulated ATmega: it says who it is, reports a property each second and answers
 * questions, one per line, at BAUD 8N1 on USART0.
 *
 *   at boot         edged-app NAME VERSION ready
 *   each PERIOD s   uptime=SECONDS
 *   version?        version=VERSION
 *   period_s=N      period_s=N     (1..255: the time between two reports from now on)
 *   period_s?       period_s=N
 *   anything else   error=unknown
 *
 * -D APP_NAME, -D APP_VERSION (strings), -D BAUD, -D F_CPU.
 * -D UNHEALTHY: starts, sends bytes that are no line, and then nothing for ever.
 * -D FILLER: the file whose bytes are added to the image, to make it as large as a test wants.
 */
#define BAUD_TOL 3 /* 115200 from 16 MHz is 2.1 % off, on every Arduino */

#include <avr/interrupt.h>
#include <avr/io.h>
#include <avr/sleep.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <util/setbaud.h>

#ifdef FILLER
__asm__(".section .progmem.data,\"a\",@progbits\n.incbin \"" FILLER "\"\n.balign 2\n.text\n");
#endif

#if defined(USART0_RX_vect)
#define USART_VECTOR USART0_RX_vect
#else
#define USART_VECTOR USART_RX_vect
#endif

#define LINE_BYTES 32

static volatile uint8_t tick;
static volatile char received[LINE_BYTES];
static volatile uint8_t received_count;
static volatile uint8_t line_ready;

ISR(TIMER1_COMPA_vect)
{
	tick = 1;
}

ISR(USART_VECTOR)
{
	char byte = (char)UDR0;
	if (line_ready || byte == '\r')
		return;
	if (byte == '\n') {
		received[received_count] = 0;
		line_ready = 1;
	} else if (received_count < LINE_BYTES - 1) {
		received[received_count++] = byte;
	}
}

static void put(const char *text)
{
	for (; *text; text++) {
		while (!(UCSR0A & _BV(UDRE0)))
			;
		UDR0 = (uint8_t)*text;
	}
}

static void put_value(const char *name, uint32_t value)
{
	char digits[11];
	put(name);
	put("=");
	put(ultoa(value, digits, 10));
	put("\r\n");
}

static void set_up(void)
{
	UBRR0H = UBRRH_VALUE;
	UBRR0L = UBRRL_VALUE;
	UCSR0A = USE_2X ? _BV(U2X0) : 0;
	UCSR0C = _BV(UCSZ01) | _BV(UCSZ00);
	UCSR0B = _BV(RXEN0) | _BV(TXEN0) | _BV(RXCIE0);
	/* once a second: CTC, clock / 1024 */
	OCR1A = F_CPU / 1024 - 1;
	TCCR1B = _BV(WGM12) | _BV(CS12) | _BV(CS10);
	TIMSK1 = _BV(OCIE1A);
	set_sleep_mode(SLEEP_MODE_IDLE);
	sei();
}

#ifndef UNHEALTHY
static uint8_t period_s = 1;

static void answer(char *line)
{
	if (strcmp(line, "version?") == 0) {
		put("version=" APP_VERSION "\r\n");
		return;
	}
	if (strncmp(line, "period_s=", 9) == 0) {
		int wanted = atoi(line + 9);
		if (wanted >= 1 && wanted <= 255)
			period_s = (uint8_t)wanted;
		put_value("period_s", period_s);
		return;
	}
	if (strcmp(line, "period_s?") == 0)
		put_value("period_s", period_s);
	else
		put("error=unknown\r\n");
}

static void answer_received(void)
{
	char line[LINE_BYTES];
	for (uint8_t i = 0; i < LINE_BYTES; i++)
		line[i] = received[i];
	received_count = 0;
	line_ready = 0;
	answer(line);
}
#endif

int main(void)
{
	set_up();
#ifdef UNHEALTHY
	put("\x1f\x7f\x1f");
	for (;;)
		sleep_mode();
#else
	uint32_t uptime_s = 0;
	uint8_t since_report_s = 0;
	put("edged-app " APP_NAME " " APP_VERSION " ready\r\n");
	for (;;) {
		if (tick) {
			tick = 0;
			uptime_s++;
			if (++since_report_s >= period_s) {
				since_report_s = 0;
				put_value("uptime", uptime_s);
			}
		}
		if (line_ready)
			answer_received();
		cli();
		if (!tick && !line_ready) {
			sleep_enable();
			sei();
			sleep_cpu();
			sleep_disable();
		}
		sei();
	}
#endif
}

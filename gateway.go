package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

const (
	// sendLimit bounds one POST to the gateway. It is tried once.
	sendLimit = 5 * time.Second
	// maxSending is how many POSTs are under way at once; more wait their turn.
	maxSending = 128
)

// errUnknownToken says that the gateway has no such stream, or no more.
var errUnknownToken = errors.New("unknown token")

// gatewayClient sends events to a gateway by POST /internal/send.
type gatewayClient struct {
	url    string // of /internal/send
	client *http.Client
	slots  chan struct{}
}

func newGatewayClient(baseURL string) *gatewayClient {
	return &gatewayClient{
		url: baseURL + "/internal/send",
		client: &http.Client{
			Transport: &http.Transport{
				MaxIdleConnsPerHost: maxSending,
				IdleConnTimeout:     time.Minute,
				DisableCompression:  true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		slots: make(chan struct{}, maxSending),
	}
}

// outgoing is the body of POST /internal/send.
type outgoing struct {
	Token string         `json:"token"`
	Event *outgoingEvent `json:"event,omitempty"`
	Close bool           `json:"close,omitempty"`
}

type outgoingEvent struct {
	ID   string `json:"id,omitempty"`
	Name string `json:"name,omitempty"`
	Data string `json:"data"`
}

// send gives the event to the stream of token and then, if end is set, ends
// the stream. Without an event and end it asks whether the stream is alive.
// buffered means that the gateway took the event but its stream is not open
// yet. The error is errUnknownToken, or says that it is unknown whether the
// gateway took the event.
func (c *gatewayClient) send(token string, e *event, end bool) (buffered bool, err error) {
	c.slots <- struct{}{}
	defer func() { <-c.slots }()
	ctx, cancel := context.WithTimeout(context.Background(), sendLimit)
	defer cancel()
	body := marshal(outgoing{Token: token, Event: (*outgoingEvent)(e), Close: end})
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return false, withoutURL(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.client.Do(req)
	if err != nil {
		return false, withoutURL(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // to the end, or the connection is not used again
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return false, errUnknownToken
	case resp.StatusCode != http.StatusOK:
		return false, fmt.Errorf("gateway answered %d", resp.StatusCode)
	case err != nil:
		return false, fmt.Errorf("reading the gateway's answer: %w", err)
	}
	return bytes.Contains(answer, []byte(`"buffered"`)), nil
}

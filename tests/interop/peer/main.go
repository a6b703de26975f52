// A ttrpc peer in Go, for the interop tests and the bench: serves or calls the service ttrpc.test.Echo.
//
//	peer serve SOCKET              serve until killed; prints "ready"
//	peer call SOCKET               call all of it; prints one "name: outcome" line for each
//	peer bench SOCKET COUNT        call Echo; prints one latency in nanoseconds per line
//	peer bench-self COUNT          the same with the server in this process
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const service = "ttrpc.test.Echo"

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func methods() map[string]ttrpc.Method {
	return map[string]ttrpc.Method{
		"Echo": func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
			var req BytesValue
			if err := unmarshal(&req); err != nil {
				return nil, err
			}
			return &req, nil
		},
		"Fail": func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
			var req StringValue
			if err := unmarshal(&req); err != nil {
				return nil, err
			}
			code, text, _ := strings.Cut(req.Value, ":")
			number, err := strconv.Atoi(code)
			check(err)
			return nil, status.Error(codes.Code(number), text)
		},
		"Wait": func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
			var req Int64Value
			if err := unmarshal(&req); err != nil {
				return nil, err
			}
			select {
			case <-time.After(time.Duration(req.Value) * time.Millisecond):
				return &req, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
		"Metadata": func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
			var req StringValue
			if err := unmarshal(&req); err != nil {
				return nil, err
			}
			md, _ := ttrpc.GetMetadata(ctx)
			values, _ := md.Get(req.Value)
			return &StringValue{Value: strings.Join(values, "|")}, nil
		},
	}
}

func listen(path string) (*ttrpc.Server, net.Listener) {
	server, err := ttrpc.NewServer()
	check(err)
	register(server)
	listener, err := net.Listen("unix", path)
	check(err)
	return server, listener
}

func dial(path string) *ttrpc.Client {
	conn, err := net.Dial("unix", path)
	check(err)
	return ttrpc.NewClient(conn)
}

func outcome(name string, result interface{}, err error) {
	if err != nil {
		fmt.Printf("%s: %d %s\n", name, status.Code(err), status.Convert(err).Message())
	} else {
		fmt.Printf("%s: %v\n", name, result)
	}
}

func call(client *ttrpc.Client) {
	ctx := context.Background()
	var data BytesValue
	err := client.Call(ctx, service, "Echo", &BytesValue{Value: []byte("hello")}, &data)
	outcome("echo", string(data.Value), err)

	big := make([]byte, 4<<20-100)
	data = BytesValue{}
	err = client.Call(ctx, service, "Echo", &BytesValue{Value: big}, &data)
	outcome("big", len(data.Value), err)

	err = client.Call(ctx, service, "Fail", &StringValue{Value: "5:not there"}, &data)
	outcome("fail", nil, err)
	err = client.Call(ctx, service, "Nothing", &StringValue{}, &data)
	outcome("no method", nil, err)
	err = client.Call(ctx, "no.Service", "Nothing", &StringValue{}, &data)
	outcome("no service", nil, err)

	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	var number Int64Value
	err = client.Call(short, service, "Wait", &Int64Value{Value: 60000}, &number)
	cancel()
	fmt.Printf("deadline: %v\n", err != nil)

	md := ttrpc.MD{}
	md.Set("key", "a", "b")
	var text StringValue
	err = client.Call(ttrpc.WithMetadata(ctx, md), service, "Metadata", &StringValue{Value: "key"}, &text)
	outcome("metadata", text.Value, err)

	var group sync.WaitGroup
	var mutex sync.Mutex
	right := 0
	for i := 0; i < 200; i++ {
		group.Add(1)
		go func(i int64) {
			defer group.Done()
			var reply Int64Value
			err := client.Call(ctx, service, "Wait", &Int64Value{Value: i % 10}, &reply)
			mutex.Lock()
			defer mutex.Unlock()
			if err == nil && reply.Value == i%10 {
				right++
			}
		}(int64(i))
	}
	group.Wait()
	outcome("concurrent", right, nil)
	callStreams(ctx, client)
}

func bench(client *ttrpc.Client, count int) {
	ctx := context.Background()
	request := &BytesValue{Value: []byte("0123456789")}
	latencies := make([]int64, 0, count)
	for i := 0; i < count; i++ {
		var reply BytesValue
		start := time.Now()
		check(client.Call(ctx, service, "Echo", request, &reply))
		latencies = append(latencies, time.Since(start).Nanoseconds())
	}
	for _, latency := range latencies {
		fmt.Println(latency)
	}
}

func main() {
	switch os.Args[1] {
	case "serve":
		server, listener := listen(os.Args[2])
		fmt.Println("ready")
		check(server.Serve(context.Background(), listener))
	case "call":
		call(dial(os.Args[2]))
	case "bench":
		count, err := strconv.Atoi(os.Args[3])
		check(err)
		bench(dial(os.Args[2]), count)
	case "bench-self":
		count, err := strconv.Atoi(os.Args[2])
		check(err)
		dir, err := os.MkdirTemp("", "ttrpc")
		check(err)
		defer os.RemoveAll(dir)
		server, listener := listen(dir + "/s")
		go server.Serve(context.Background(), listener)
		bench(dial(dir+"/s"), count)
	}
}

//go:build streams

// ttrpc 1.2: streams, with Google's protobuf.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type (
	BytesValue  = wrapperspb.BytesValue
	StringValue = wrapperspb.StringValue
	Int64Value  = wrapperspb.Int64Value
)

func register(server *ttrpc.Server) {
	server.RegisterService(service, &ttrpc.ServiceDesc{
		Methods: methods(),
		Streams: map[string]ttrpc.Stream{
			"Count":  {Handler: count, StreamingClient: true},
			"Repeat": {Handler: repeat, StreamingServer: true},
			"Chat":   {Handler: chat, StreamingClient: true, StreamingServer: true},
		},
	})
}

func count(ctx context.Context, stream ttrpc.StreamServer) (interface{}, error) {
	total := int64(0)
	for {
		var message BytesValue
		if err := stream.RecvMsg(&message); err == io.EOF {
			return &Int64Value{Value: total}, nil
		} else if err != nil {
			return nil, err
		}
		total += int64(len(message.Value))
	}
}

func repeat(ctx context.Context, stream ttrpc.StreamServer) (interface{}, error) {
	var request Int64Value
	if err := stream.RecvMsg(&request); err != nil {
		return nil, err
	}
	if request.Value < 0 {
		return nil, status.Error(codes.OutOfRange, "less than nothing")
	}
	for i := int64(0); i < request.Value; i++ {
		if err := stream.SendMsg(&BytesValue{Value: []byte(fmt.Sprint(i))}); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func chat(ctx context.Context, stream ttrpc.StreamServer) (interface{}, error) {
	for {
		var message BytesValue
		if err := stream.RecvMsg(&message); err == io.EOF {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		if string(message.Value) == "fail" {
			return nil, status.Error(codes.Aborted, "as asked")
		}
		if err := stream.SendMsg(&message); err != nil {
			return nil, err
		}
	}
}

func receiveAll(stream ttrpc.ClientStream) (int, error) {
	for received := 0; ; received++ {
		var message BytesValue
		if err := stream.RecvMsg(&message); errors.Is(err, io.EOF) {
			return received, nil
		} else if err != nil {
			return received, err
		}
	}
}

func callStreams(ctx context.Context, client *ttrpc.Client) {
	open := func(name string, fromClient, fromServer bool, request interface{}) ttrpc.ClientStream {
		desc := &ttrpc.StreamDesc{StreamingClient: fromClient, StreamingServer: fromServer}
		stream, err := client.NewStream(ctx, desc, service, name, request)
		check(err)
		return stream
	}

	stream := open("Count", true, false, nil)
	for size := 0; size < 10; size++ {
		check(stream.SendMsg(&BytesValue{Value: make([]byte, size)}))
	}
	check(stream.CloseSend())
	var total Int64Value
	err := stream.RecvMsg(&total)
	outcome("count", total.Value, err)

	received, err := receiveAll(open("Repeat", false, true, &Int64Value{Value: 50}))
	outcome("repeat", received, err)
	received, err = receiveAll(open("Repeat", false, true, &Int64Value{Value: 0}))
	outcome("repeat nothing", received, err)
	_, err = receiveAll(open("Repeat", false, true, &Int64Value{Value: -1}))
	outcome("repeat less", nil, err)

	stream = open("Chat", true, true, nil)
	right := 0
	for i := 0; i < 20; i++ {
		var reply BytesValue
		check(stream.SendMsg(&BytesValue{Value: []byte(fmt.Sprint(i))}))
		if err := stream.RecvMsg(&reply); err == nil && string(reply.Value) == fmt.Sprint(i) {
			right++
		}
	}
	check(stream.CloseSend())
	err = stream.RecvMsg(&BytesValue{})
	outcome("chat", right, nil)
	fmt.Printf("chat ends: %v\n", err)

	stream = open("Chat", true, true, nil)
	check(stream.SendMsg(&BytesValue{Value: []byte("fail")}))
	outcome("chat fails", nil, stream.RecvMsg(&BytesValue{}))
}
